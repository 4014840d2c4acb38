"""What the public plane reads and answers, as types: for mypy, and for the OpenAPI document."""

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Base64Bytes, Field
from typing_extensions import TypedDict

Parameter = bool | int | float | str
Parameters = dict[str, Parameter]

# /v1


class ClassifyRequest(TypedDict):
    """Several images in one request. All of them are classified, or none."""

    images: Annotated[list[Base64Bytes], Field(min_length=1, description="PNG, JPEG or WebP files in base64")]


class Candidate(TypedDict):
    """A class and its probability."""

    label: str
    index: Annotated[int, Field(description="of the label in the library's classes")]
    probability: float


class Prediction(TypedDict):
    """One image's likeliest class. Where TOMBOLA_OUTPUT_DETAIL is label, there are no probabilities."""

    label: str
    index: Annotated[int, Field(description="of the label in the library's classes")]
    probability: NotRequired[float]
    top: NotRequired[Annotated[list[Candidate], Field(description="the likeliest classes, likeliest first")]]


class Classification(TypedDict):
    """The answer of /v1/classify."""

    request_id: Annotated[str, Field(description="the same as the header X-Request-Id")]
    library: Annotated[str, Field(description="digest of the library that answered")]
    predictions: Annotated[list[Prediction], Field(description="in the order of the images")]


class Live(TypedDict):
    live: Literal[True]


class Ready(TypedDict):
    ready: Literal[True]


# /v2, the Open Inference Protocol


class LiveAndReady(TypedDict):
    live: Literal[True]
    ready: Literal[True]


class ServerMetadata(TypedDict):
    name: str
    version: str
    extensions: list[str]


class ModelNames(TypedDict):
    models: list[str]


class ModelState(TypedDict):
    """One model in the repository's index."""

    name: str
    version: str
    state: Literal["READY", "UNAVAILABLE"]
    reason: str


class TensorMetadata(TypedDict):
    name: str
    datatype: str
    shape: Annotated[list[int], Field(description="-1: as many as there are images")]


class ModelMetadata(TypedDict):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ModelReady(TypedDict):
    name: str
    ready: Literal[True]


class ConfigTensor(TypedDict):
    """A tensor in Triton's terms, whose dims leave the number of images out."""

    name: str
    data_type: str
    dims: list[int]
    reshape: NotRequired[dict[str, list[int]]]
    optional: NotRequired[bool]


class ModelConfig(TypedDict):
    name: str
    platform: str
    backend: str
    max_batch_size: int
    input: list[ConfigTensor]
    output: list[ConfigTensor]
    dynamic_batching: dict[str, Any]


class Duration(TypedDict):
    count: int
    ns: Annotated[int, Field(description="in whole seconds: exact times would tell of single requests")]


class InferenceStatistics(TypedDict):
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


class ModelStatistics(TypedDict):
    """Of this process."""

    name: str
    version: str
    last_inference: Annotated[int, Field(description="milliseconds since 1970")]
    inference_count: int
    execution_count: int
    inference_stats: InferenceStatistics
    batch_stats: list[dict[str, Any]]


class Statistics(TypedDict):
    model_stats: list[ModelStatistics]


class InputTensor(TypedDict):
    """image: N encoded files. pixels: [N, 3, height, width], 0 to 255 or 0 to 1."""

    name: Literal["image", "pixels"]
    shape: list[int]
    datatype: Literal["BYTES", "UINT8", "FP32"]
    parameters: NotRequired[Parameters]
    data: NotRequired[
        Annotated[list[Any], Field(description="nested as shape says or flat; files in base64; none if binary")]
    ]


class OutputRequest(TypedDict):
    name: Literal["probabilities", "index", "label"]
    parameters: NotRequired[Annotated[Parameters, Field(description="binary_data, classification")]]


class InferRequestBody(TypedDict):
    """An inference request in JSON. Without outputs, all are answered."""

    id: NotRequired[str]
    parameters: NotRequired[Annotated[Parameters, Field(description="timeout (µs), binary_data_output")]]
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1)]
    outputs: NotRequired[list[OutputRequest]]


class OutputTensor(TypedDict):
    name: str
    datatype: str
    shape: list[int]
    data: NotRequired[Annotated[list[float | int | str], Field(description="flat, row by row; none if binary")]]
    parameters: NotRequired[Annotated[Parameters, Field(description="binary_data_size, in bytes")]]


class InferAnswer(TypedDict):
    """The answer to an inference request, in JSON."""

    model_name: str
    model_version: str
    id: NotRequired[str]
    outputs: list[OutputTensor]

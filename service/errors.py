"""What a client may be told when it gets no answer: the catalogue of texts, and errors with their statuses.

A text is a constant with at most numbers of our own settings filled in. Nothing of the request, of a file, of an
exception or of theta can enter one, whatever raised it.
"""

import traceback
from enum import StrEnum
from typing import ClassVar, Final

SECOND: Final = 1  # Retry-After where no better figure is known
REQUEST_ID: Final = "tombola.request_id"  # where the scope holds it


class ErrorMessage(StrEnum):
    """Every sentence an error can say. Braces are filled with numbers only."""

    # bodies
    EMPTY_BODY = "The body is empty; expected a PNG, JPEG or WebP image, or JSON."
    BODY_TOO_LARGE = "The body is larger than {limit} bytes, which is this server's limit."
    BODY_SLOW = "The body did not arrive within {limit} s."
    BODY_TYPE = "This content type is not read here; send the image itself, JSON, or application/octet-stream."
    JSON_TYPE = (
        "The body looks like JSON, and its content type is another; send the header Content-Type: application/json."
    )
    BODY_PACKING = "Content-Encoding must be gzip, deflate or identity."
    BODY_INFLATE = "The body cannot be unpacked as its Content-Encoding says."
    BODY_NEITHER = "The body is neither a PNG, JPEG or WebP image nor JSON."
    MULTIPART = "The multipart body is damaged or empty; expected multipart/form-data with one image in each part."
    LENGTH_HEADER = "Content-Length is not a number."
    HEADER_TWICE = "A header that may be given once was given twice."
    TIMEOUT_HEADER = "Tombola-Timeout-Ms must be a whole number of milliseconds, at least 1."
    IDEMPOTENCY = "Idempotency-Key is not honoured: no answer is kept, and a request sent again is answered anew."
    # JSON
    JSON_MALFORMED = "The body is not valid JSON."
    JSON_TOO_MANY = "The JSON holds more than {limit} values; send pixels as a binary tensor."
    JSON_OBJECT = "The JSON body must be an object."
    JSON_IMAGES = 'Expected {{"images": ["<base64>", ...]}} with at least one string and nothing else.'
    BASE64 = "An image is not valid base64."
    # images
    IMAGE_EMPTY = "An image is empty."
    IMAGE_FORMAT = "An image is of an unsupported format; expected PNG, JPEG or WebP."
    IMAGE_SAMPLES = "An image has samples or colours that are not read here; expected 8 or 16 bits, not HDR."
    IMAGE_DAMAGED = "An image is damaged or cut short."
    IMAGE_TOO_LARGE = "An image has more than {limit} pixels, which is this server's limit."
    IMAGE_SLOW = "Decoding took longer than {limit} s."
    IMAGES_TOO_MANY = "The request holds more than {limit} images, which is this server's limit."
    # Open Inference Protocol
    MODEL_UNKNOWN = "No such model; the only one is tombola, version 1."
    V2_TYPE = "Expected a body of JSON, or application/octet-stream."
    V2_HEADER_LENGTH = "Inference-Header-Content-Length must be a whole number, at most the body's length."
    V2_ID = "id must be a string of at most {limit} characters."
    V2_PARAMETERS = "parameters must be an object of at most {limit} strings, numbers and booleans."
    V2_TIMEOUT = "The parameter timeout must be a whole number of microseconds, 0 or more."
    V2_BINARY_FLAG = "binary_data and binary_data_output must be true or false."
    V2_INPUTS = "Expected exactly one input: image (BYTES) or pixels (UINT8 or FP32)."
    V2_INPUT_KEYS = "An input has name, shape, datatype, and data or parameters; nothing else."
    V2_DATATYPE = "Wrong datatype: image is BYTES, pixels are UINT8 or FP32."
    V2_HALF_JSON = "FP16 and BF16 cannot travel here; pixels are UINT8 or FP32."
    V2_SHAPE_IMAGE = "Wrong shape: image is [N] with N of at least 1."
    V2_SHAPE_PIXELS = "Wrong shape: pixels are [N, 3, {height}, {width}] with N of at least 1."
    V2_DATA = "data must be a JSON array, nested as shape says or flat, with exactly the shape's number of elements."
    V2_DATA_TWICE = "An input has either data or binary_data_size, not both and not neither."
    V2_DATA_UINT8 = "UINT8 pixels are whole numbers from 0 to 255."
    V2_DATA_FP32 = "FP32 pixels are numbers from 0 to 1."
    V2_DATA_BYTES = "Elements of a BYTES input in JSON are strings: the image in base64."
    V2_SHARED_MEMORY = "Shared memory is not offered."
    V2_BINARY_SIZE = "binary_data_size must be what shape and datatype need, and all that follows the JSON."
    V2_BINARY_BYTES = (
        "A BYTES tensor must be elements of a 4-byte little-endian length and that many bytes, as many as shape says."
    )
    V2_OUTPUTS = "outputs must be a list of distinct outputs of this model, as its metadata names them."
    V2_CLASSIFICATION = "classification is a whole number of at least 1, on the output probabilities."
    GRPC_MESSAGE = "Expected one message ModelInferRequest of the Open Inference Protocol."
    GRPC_CONTENTS = "The input has either contents or one element of raw_input_contents, not both and not neither."
    NOT_OFFERED = "This server does not offer that extension."
    # access
    KEY_REQUIRED = "An API key is required: Authorization: Bearer <key>."
    TOKEN_REQUIRED = "The admin token is required: Authorization: Bearer <token>."  # noqa: S105 -- a sentence
    TOKEN_IN_URL = "Send credentials in the Authorization header, never in the URL."  # noqa: S105
    FAILURES = "Too many failed attempts to authenticate from this address."
    RATE = "Too many images from this client; slow down."
    # HTTP
    CONNECT = "This server is no proxy: CONNECT is not offered."
    FRAMING = "The body's end is ambiguous; expected one Content-Length or Transfer-Encoding: chunked, and HTTP/1.1."
    HEAD_TOO_LARGE = "The request line and headers are larger than {limit} bytes, which is this server's limit."
    HOST = "The Host header is missing or malformed; HTTP/1.1 expects exactly one."
    TARGET = "The request target must be a path, or a URL with the authority that the Host header names."
    VERSION = "The protocol must be HTTP/1.0 or HTTP/1.1."
    # the rest
    NOT_FOUND = "No such path."
    METHOD = "This path does not accept that method."
    CROSS_ORIGIN = "Pages of that origin may not send such a request; TOMBOLA_CORS_ORIGINS names those that may."
    BAD_REQUEST = "The request cannot be understood."
    LIBRARY_REFUSED = "The library was refused and the old one keeps serving; the server's log says why."
    SWAP_RUNNING = "A swap of the library is already running."
    LIBRARY_CHANGED = "The configured library is not the one of that digest; compare again. The old one keeps serving."
    DIGEST = "digest must be a library's digest: 64 hex digits, given once."
    SINCE = "since must be a number of seconds, 0 or more, given once."
    FULL = "The server is full; try again."
    BODIES_FULL = "The server holds as many bodies as it may; try again."
    DRAINING = "The server is shutting down; another replica will answer."
    NOT_READY = "The server is not ready."
    DEADLINE = "The deadline passed before the answer was ready."
    FAILED = "The server failed to answer this request."


class ServiceError(Exception):
    """A request that gets no answer: status, text, and when to come back (seconds)."""

    status: ClassVar[int] = 500
    text: ClassVar[ErrorMessage] = ErrorMessage.FAILED
    retry_after_s: ClassVar[int | None] = None
    outcome: ClassVar[str] = "invalid"  # of the metric inference_requests_total
    close_connection: ClassVar[bool] = False  # the body was left unread, so the connection cannot be used again

    def __init__(
        self,
        text: ErrorMessage | None = None,
        *,
        limit: float = 0,
        height: int = 0,
        width: int = 0,
        retry_after: int | None = None,
    ) -> None:
        number = str(int(limit)) if limit == int(limit) else str(limit)
        self.message: Final = (text or self.text).format(limit=number, height=height, width=width)
        self.retry_after: Final = self.retry_after_s if retry_after is None else retry_after
        super().__init__(self.message)


class BadRequest(ServiceError):
    status = 400
    text = ErrorMessage.BAD_REQUEST


class Unauthorized(ServiceError):
    status = 401
    text = ErrorMessage.KEY_REQUIRED


class NotFound(ServiceError):
    status = 404
    text = ErrorMessage.NOT_FOUND


class MethodNotAllowed(ServiceError):
    status = 405
    text = ErrorMessage.METHOD


class RequestTimeout(ServiceError):
    """The client's body did not arrive in time."""

    status = 408
    text = ErrorMessage.BODY_SLOW
    close_connection = True


class Conflict(ServiceError):
    status = 409
    text = ErrorMessage.SWAP_RUNNING


class ContentTooLarge(ServiceError):
    status = 413
    text = ErrorMessage.BODY_TOO_LARGE


class BodyTooLarge(ContentTooLarge):
    """Known before, or while, the body is read."""

    close_connection = True


class RequestHeaderFieldsTooLarge(ServiceError):
    status = 431
    text = ErrorMessage.HEAD_TOO_LARGE


class UnsupportedMediaType(ServiceError):
    """Content of a kind that is not read here."""

    status = 415
    text = ErrorMessage.BODY_TYPE


class RateLimited(ServiceError):
    status = 429
    text = ErrorMessage.RATE
    retry_after_s = SECOND
    outcome = "shed"


class EngineFailed(ServiceError):
    outcome = "error"


class NotImplementedByServer(ServiceError):
    status = 501
    text = ErrorMessage.NOT_OFFERED


class Overloaded(ServiceError):
    status = 503
    text = ErrorMessage.FULL
    retry_after_s = SECOND
    outcome = "shed"


class Draining(Overloaded):
    text = ErrorMessage.DRAINING


class NotReady(ServiceError):
    status = 503
    text = ErrorMessage.NOT_READY
    retry_after_s = SECOND
    outcome = "error"


class DeadlineExceeded(ServiceError):
    status = 504
    text = ErrorMessage.DEADLINE
    outcome = "deadline"


class ClientDisconnected(Exception):
    """The client hung up before its answer was ready. Nobody is there to be told."""


def where(error: BaseException) -> str:
    """The line that raised. Never the exception's text: it may quote the request, a path or theta."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}" if frames else "an unknown line"

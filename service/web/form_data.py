"""Bodies of multipart/form-data, as `curl -F image=@x.png` and HTML forms send them: one part, one image."""

from typing import Final

from multipart import MultipartError, MultipartSegment, ParserLimitReached, PushMultipartParser, parse_options_header

from service.errors import BadRequest, ContentTooLarge, ErrorMessage

MEDIA_TYPE: Final = b"multipart/form-data"
MAX_HEADERS: Final = 8  # of one part
MAX_BOUNDARY: Final = 70  # characters, RFC 2046


def read_parts(body: bytes, content_type: bytes, max_images: int) -> list[bytes]:
    """The parts' contents in order, whatever their names.

    Raises BadRequest, ContentTooLarge.
    """
    _, options = parse_options_header(content_type.decode("latin-1"))
    boundary = options.get("boundary", "")
    if not 0 < len(boundary) <= MAX_BOUNDARY or not boundary.isascii():
        raise BadRequest(ErrorMessage.MULTIPART)
    parts: list[bytearray] = []
    parser = PushMultipartParser(boundary, max_header_count=MAX_HEADERS, max_segment_count=max_images, strict=True)
    try:
        with parser:
            for event in parser.parse(body):
                if isinstance(event, MultipartSegment):
                    parts.append(bytearray())
                elif event is not None:
                    parts[-1] += event
    except ParserLimitReached:
        if len(parts) < max_images:
            raise BadRequest(ErrorMessage.MULTIPART) from None
        raise ContentTooLarge(ErrorMessage.IMAGES_TOO_MANY, limit=max_images) from None
    except (MultipartError, ValueError):  # ValueError: names that are no UTF-8
        raise BadRequest(ErrorMessage.MULTIPART) from None
    if not parts:
        raise BadRequest(ErrorMessage.MULTIPART)
    return [bytes(part) for part in parts]

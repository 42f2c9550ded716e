"""Messages that the TensorBoard tracker writes. protobuf makes the classes at import."""

from collections.abc import Sequence

class Summary:
    class Image:
        def __init__(
            self, *, height: int, width: int, colorspace: int, encoded_image_string: bytes
        ) -> None: ...

    class Value:
        def __init__(
            self, *, tag: str, image: Summary.Image = ..., simple_value: float = ...
        ) -> None: ...

    def __init__(self, *, value: Sequence[Summary.Value]) -> None: ...

from google.api import annotations_pb2 as _annotations_pb2
from google.api import httpbody_pb2 as _httpbody_pb2
from . import adapters_pb2 as _adapters_pb2
from . import chat_pb2 as _chat_pb2
from . import completions_pb2 as _completions_pb2
from . import generate_pb2 as _generate_pb2
from . import invocations_pb2 as _invocations_pb2
from . import responses_pb2 as _responses_pb2
from . import server_pb2 as _server_pb2
from . import tokenize_pb2 as _tokenize_pb2
from google.protobuf import descriptor as _descriptor
from typing import ClassVar as _ClassVar

DESCRIPTOR: _descriptor.FileDescriptor

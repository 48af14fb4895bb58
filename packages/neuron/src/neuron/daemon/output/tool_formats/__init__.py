"""One module per way of writing a tool call between the markers."""

from neuron.daemon.output.tool_formats.base import CallAction, CallParser, EndCall, MoreArguments, StartCall
from neuron.daemon.output.tool_formats.qwen_json import QwenJsonParser
from neuron.daemon.output.tool_formats.qwen_xml import QwenXmlParser

__all__ = [
    "CallAction",
    "CallParser",
    "EndCall",
    "MoreArguments",
    "QwenJsonParser",
    "QwenXmlParser",
    "StartCall",
]

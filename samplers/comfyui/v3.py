"""The nodes for ComfyUI's second interface (V3), and what our folder in custom_nodes/ exports."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import Any

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


def exports() -> dict[str, Any]:
    """What our folder in custom_nodes/ defines: the mappings, and the entry point (V3) if this ComfyUI has one.

    A ComfyUI that reads both takes the mappings. The nodes are the same.
    """
    found: dict[str, Any] = {
        "NODE_CLASS_MAPPINGS": NODE_CLASS_MAPPINGS,
        "NODE_DISPLAY_NAME_MAPPINGS": NODE_DISPLAY_NAME_MAPPINGS,
    }
    with suppress(ImportError):
        import_module("comfy_api.latest")
        found["comfy_entrypoint"] = comfy_entrypoint
    return found


async def comfy_entrypoint() -> Any:
    """The same nodes for ComfyUI's second interface (V3), made from the classes in `nodes`."""
    latest = import_module("comfy_api.latest")

    async def get_node_list(self: Any) -> list[type]:
        return [_as_v3(latest.io, node_id, node) for node_id, node in NODE_CLASS_MAPPINGS.items()]

    return type("Extension", (latest.ComfyExtension,), {"get_node_list": get_node_list})()


def _as_v3(io: Any, node_id: str, node: Any) -> type:
    kinds = {
        "MODEL": io.Model,
        "LATENT": io.Latent,
        "IMAGE": io.Image,
        "STRING": io.String,
        "FLOAT": io.Float,
        "INT": io.Int,
        "BOOLEAN": io.Boolean,
    }
    groups = node.INPUT_TYPES()
    hidden = groups.get("hidden", {})

    def define_schema(cls: Any, /) -> Any:
        names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
        return io.Schema(
            node_id=node_id,
            display_name=NODE_DISPLAY_NAME_MAPPINGS[node_id],
            category=node.CATEGORY,
            description=node.DESCRIPTION,
            inputs=[
                _input(
                    io.Combo if isinstance(kind, list) else kinds[kind], name, kind, *rest, optional=group != "required"
                )
                for group in ("required", "optional")
                for name, (kind, *rest) in groups.get(group, {}).items()
            ],
            outputs=[
                kinds[kind].Output(display_name=name) for kind, name in zip(node.RETURN_TYPES, names, strict=True)
            ],
            hidden=[getattr(io.Hidden, name) for name in hidden],
        )

    def execute(cls: Any, /, **given: Any) -> Any:
        given |= {name: getattr(cls.hidden, name) for name in hidden}
        return io.NodeOutput(*getattr(node(), node.FUNCTION)(**given))

    methods: dict[str, Any] = {"define_schema": classmethod(define_schema), "execute": classmethod(execute)}
    if changed := getattr(node, "IS_CHANGED", None):
        methods["fingerprint_inputs"] = classmethod(lambda cls, /, **given: changed(**given))
    methods["__module__"] = __name__
    return type(node.__name__, (io.ComfyNode,), methods)


def _input(host: Any, name: str, kind: Any, options: dict[str, Any] | None = None, *, optional: bool) -> Any:
    choices = {"options": kind} if isinstance(kind, list) else {}
    return host.Input(name, optional=optional, **choices, **(options or {}))

"""The nodes for ComfyUI's second interface (V3), and what custom_nodes/stepcache exports."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS


def exports() -> dict[str, Any]:
    """What custom_nodes/stepcache/__init__.py defines: the entry point (V3) if this ComfyUI has one, else the mappings.

    Never both: if a module has both, ComfyUI takes the mappings and does not call the entry point.
    """
    try:
        import_module("comfy_api.latest")
    except ImportError:
        return {
            "NODE_CLASS_MAPPINGS": NODE_CLASS_MAPPINGS,
            "NODE_DISPLAY_NAME_MAPPINGS": NODE_DISPLAY_NAME_MAPPINGS,
        }
    return {"comfy_entrypoint": comfy_entrypoint}


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
        "STRING": io.String,
        "FLOAT": io.Float,
        "INT": io.Int,
        "BOOLEAN": io.Boolean,
    }

    def inputs() -> list[Any]:
        found = []
        for group, entries in node.INPUT_TYPES().items():
            for name, (kind, *rest) in entries.items():
                options = {**(rest[0] if rest else {}), "optional": group == "optional"}
                if isinstance(kind, list):
                    found.append(io.Combo.Input(name, options=kind, **options))
                else:
                    found.append(kinds[kind].Input(name, **options))
        return found

    def define_schema(cls: Any, /) -> Any:
        names = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
        return io.Schema(
            node_id=node_id,
            display_name=NODE_DISPLAY_NAME_MAPPINGS[node_id],
            category=node.CATEGORY,
            description=node.DESCRIPTION,
            inputs=inputs(),
            outputs=[
                kinds[kind].Output(display_name=name) for kind, name in zip(node.RETURN_TYPES, names, strict=True)
            ],
        )

    def execute(cls: Any, /, **given: Any) -> Any:
        return io.NodeOutput(*getattr(node(), node.FUNCTION)(**given))

    methods = {"define_schema": classmethod(define_schema), "execute": classmethod(execute), "__module__": __name__}
    return type(node.__name__, (io.ComfyNode,), methods)

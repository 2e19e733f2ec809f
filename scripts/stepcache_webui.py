"""The entry point for A1111, Forge, reForge, Forge Classic and Forge Neo; everything is in samplers/webui/."""

from modules import script_callbacks, scripts

from stepcache.samplers import webui


class StepCache(webui.Extension, scripts.Script):
    """The panel and the hooks of `webui.Extension` as a script of the host."""


webui.register(script_callbacks, scripts)

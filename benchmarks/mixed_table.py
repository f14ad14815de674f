def render(result): return ""

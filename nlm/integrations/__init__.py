"""nlm inside the tools that people merge with: one module per host, which nlm never imports."""

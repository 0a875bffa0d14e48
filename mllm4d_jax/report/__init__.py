"""Self-contained HTML pages with inline SVG charts. Standard library, NumPy and OpenCV only; never imports jax."""

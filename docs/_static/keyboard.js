// Boxes that scroll sideways can be reached and scrolled by keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const box of document.querySelectorAll(".output.text_html, div.highlight > pre, .cell_output pre, .table-wrapper, div.math")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
});

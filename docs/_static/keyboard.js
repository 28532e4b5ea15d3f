// Boxes that scroll sideways, and what opens the navigation in a narrow window, can be reached and used by keyboard.
document.addEventListener("DOMContentLoaded", () => {
  for (const label of document.querySelectorAll("label.nav-overlay-icon, label.toc-overlay-icon")) {
    label.tabIndex = 0;
    label.setAttribute("role", "button");
    label.setAttribute("aria-label", label.htmlFor === "__toc" ? "Table of contents" : "Site navigation");
    label.addEventListener("keydown", event => {
      if (event.key === "Enter" || event.key === " ") { event.preventDefault(); label.click(); }
    });
  }
  for (const box of document.querySelectorAll(".output.text_html, div.highlight > pre, .cell_output pre, .table-wrapper, div.math")) {
    if (box.scrollWidth > box.clientWidth + 1) box.tabIndex = 0;
  }
});

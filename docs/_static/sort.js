// A table of class `sortable` is sorted by the column whose heading is pressed, and shows the rows that hold the words typed above it.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("table.sortable").forEach(table => {
    const body = table.tBodies[0], rows = [...body.rows];
    const value = (row, column) => {
      const text = row.cells[column].textContent, number = parseFloat(text.replace("−", "-"));
      return isNaN(number) ? text : number;
    };
    table.querySelectorAll("thead th").forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") !== "descending";
        table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = (a, b) => {
          const [x, y] = [value(a, column), value(b, column)];
          return typeof x === typeof y ? (x > y) - (x < y) : typeof x === "number" ? 1 : -1;
        };
        rows.sort((a, b) => (down ? -1 : 1) * order(a, b));
        body.append(...rows);
      });
    });
    const box = document.createElement("label"), field = document.createElement("input"), count = document.createElement("output");
    field.type = "search";
    field.placeholder = "e.g. fog archrepair";
    box.className = "filter";
    box.append("Rows with ", field, " ", count);
    const show = () => {
      const words = field.value.toLowerCase().split(/\s+/);
      rows.forEach(row => { row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word)); });
      count.textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length}`;
    };
    field.addEventListener("input", show);
    show();
    (table.closest(".table-box") || table).before(box);
  });
});

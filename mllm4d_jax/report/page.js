"use strict";
// Sorting, filtering, keys and the theme switch. The page is complete without any of it.
(() => {
  const all = (selector, within = document) => Array.from(within.querySelectorAll(selector));
  const make = (name, attributes = {}, ...children) => {
    const element = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  };

  // Some browsers refuse storage to a page opened from a file; the choice then lasts as long as the page.
  const remember = {
    get: () => { try { return localStorage.getItem("report-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("report-theme", value); } catch { /* not remembered */ } },
  };
  const THEMES = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  function applyTheme(theme) {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    button.dataset.now = theme;
  }
  function nextTheme() {
    const theme = THEMES[(THEMES.indexOf(button.dataset.now) + 1) % THEMES.length];
    applyTheme(theme);
    remember.set(theme);
  }
  applyTheme(THEMES.includes(remember.get()) ? remember.get() : "auto");
  button.hidden = false;
  button.addEventListener("click", nextTheme);

  // One search box and its count over a list of elements; `extra` narrows further.
  function searchable(items, before, what, extra = () => true) {
    const texts = new Map(items.map((item) => [item, item.textContent.toLowerCase()]));
    const box = make("input", { type: "search", class: "filter", autocomplete: "off" });
    const count = make("output", { "aria-live": "polite" });
    const bar = make("div", { class: "controls" }, make("label", {}, `Filter ${what}`, box), count);
    const update = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const item of items) {
        item.hidden = !(words.every((word) => texts.get(item).includes(word)) && extra(item));
        shown += item.hidden ? 0 : 1;
      }
      count.value = `${shown} of ${items.length}`;
    };
    box.addEventListener("input", update);
    box.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { box.value = ""; update(); box.blur(); }
    });
    before.before(bar);
    update();
    return { bar, update };
  }

  // Numbers before texts, what has no value last in either direction, equal ones in their first order.
  function compare(a, b, sign) {
    if (a === "" || b === "") return (a === "") - (b === "");
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
  }
  function reorder(parent, items, key, sign) {
    const values = new Map(items.map((item) => [item, key(item)]));
    const sorted = sign ? [...items].sort((a, b) => compare(values.get(a), values.get(b), sign)) : items;
    parent.append(...sorted);
  }

  function sortable(table) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const heads = all("thead th", table);
    const value = (column) => (row) => {
      const stored = row.cells[column].dataset.sort;
      if (stored === undefined) return row.cells[column].textContent.trim();
      return stored === "" ? "" : Number(stored);
    };
    heads.forEach((head, column) => {
      const press = make("button", { type: "button", class: "sort" }, head.textContent);
      head.replaceChildren(press);
      press.addEventListener("click", () => {
        const next = { ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")] ?? "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (next !== "none") head.setAttribute("aria-sort", next);
        reorder(body, rows, value(column), { ascending: 1, descending: -1, none: 0 }[next]);
      });
    });
  }

  function browsable(list) {
    const items = all(":scope > .card", list);
    const facets = new Map(items.map((item) => [item, JSON.parse(item.dataset.facets ?? "{}")]));
    const keys = new Map(items.map((item) => [item, JSON.parse(item.dataset.keys ?? "{}")]));
    const names = (source) => [...new Set(items.flatMap((item) => Object.keys(source.get(item))))].sort();
    const selects = new Map();
    const bounds = new Map();
    const within = (value, [from, to]) =>
      (from.value === "" || value >= Number(from.value)) && (to.value === "" || value <= Number(to.value));
    const keep = (item) =>
      [...selects].every(([name, s]) => !s.value || facets.get(item)[name] === s.value) &&
      [...bounds].every(([name, pair]) => within(keys.get(item)[name] ?? NaN, pair));
    const { bar, update } = searchable(items, list, list.getAttribute("aria-label"), keep);
    for (const name of names(facets)) {
      const values = [...new Set(items.map((item) => facets.get(item)[name]).filter((v) => v !== undefined))].sort();
      const options = values.map((v) => make("option", { value: v }, v));
      const select = make("select", {}, make("option", { value: "" }, "all"), ...options);
      select.addEventListener("change", update);
      selects.set(name, select);
      bar.insertBefore(make("label", {}, name, select), bar.lastChild);
    }
    for (const name of JSON.parse(list.dataset.ranges ?? "[]")) {
      const values = items.map((item) => keys.get(item)[name]).filter((v) => v !== undefined);
      if (!values.length) continue;
      const [low, high] = [Math.min(...values), Math.max(...values)];
      const pair = [["from", low], ["to", high]].map(([word, bound]) => {
        const input = make("input", { type: "number", step: "any", placeholder: bound });
        input.addEventListener("input", update);
        bar.insertBefore(make("label", {}, `${name} ${word}`, input), bar.lastChild);
        return input;
      });
      bounds.set(name, pair);
    }
    if (!names(keys).length) return;
    const options = names(keys).flatMap((name) => [
      make("option", { value: JSON.stringify([name, 1]) }, `${name} ↑`),
      make("option", { value: JSON.stringify([name, -1]) }, `${name} ↓`),
    ]);
    const order = make("select", {}, make("option", { value: '["",0]' }, "as made"), ...options);
    order.addEventListener("change", () => {
      const [name, sign] = JSON.parse(order.value);
      reorder(list, items, (item) => keys.get(item)[name] ?? "", sign);
    });
    bar.insertBefore(make("label", {}, "sort by", order), bar.lastChild);
  }

  all("table[data-sortable]").forEach(sortable);
  all("table[data-filter]").forEach((table) => {
    searchable(Array.from(table.tBodies[0].rows), table.parentElement, "rows");
  });
  all(".cards").forEach(browsable);

  function stepCard(by) {
    const shown = all(".card").filter((card) => !card.hidden);
    const now = shown.findIndex((card) => card.contains(document.activeElement));
    const next = shown[now < 0 ? 0 : Math.min(Math.max(now + by, 0), shown.length - 1)];
    if (next) { next.focus({ preventScroll: true }); next.scrollIntoView({ block: "center" }); }
  }
  function focusFilter() {
    // The first filter that is on the screen or below, else the first one.
    const boxes = all("input.filter");
    (boxes.find((box) => box.getBoundingClientRect().bottom > 0) ?? boxes[0])?.focus();
  }
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const action = { j: () => stepCard(1), k: () => stepCard(-1), "/": focusFilter, t: nextTheme }[event.key];
    if (action) { event.preventDefault(); action(); }
  });
  const key = (name) => make("kbd", {}, name);
  document.getElementById("keys").append(
    "Keys: ", key("/"), " filter, ", key("Esc"), " clear it, ", key("j"), " ", key("k"), " next and previous card, ",
    key("t"), " theme. A click on a column's head sorts by it.",
  );
})();

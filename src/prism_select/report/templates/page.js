"use strict";
// Charts and tables of the page. What a pool or a target says comes from the JSON block and reaches the page as text only.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const isNumber = value => typeof value === "number" && Number.isFinite(value);
  const write = {
    count: value => value.toLocaleString("en"),
    score: value => {
      const size = Math.abs(value);
      const text = value === 0 ? "0" : size >= 1e4 || size < 1e-3 ? value.toExponential(2) : value.toPrecision(3);
      return text.replace("-", "−");
    },
    move: value => (value > 0 ? "+" : "") + write.share(value),
    share: value => (100 * value).toFixed(Math.abs(value) < 0.1 ? 1 : 0).replace("-", "−") + "%",
  };
  const written = (value, kind) => (kind === "name" || kind === "text" ? String(value ?? "") : isNumber(value) ? write[kind](value) : "");

  // ------------------------------------------------------------------ charts
  const draw = async host => {
    const spec = data.charts[host.dataset.chart];
    const tooltip = { disableDefaultStyle: true };
    const inner = make("div"); // Vega gives what it draws in a role and a name of its own
    inner.ariaHidden = "true";
    host.append(inner);
    await vegaEmbed(inner, spec, { actions: false, renderer: "svg", ast: true, defaultStyle: false, tooltip });
  };
  const plots = [...document.querySelectorAll("[data-chart]")];
  const drawn = Promise.all(plots.map(draw));

  // ------------------------------------------------------------------ a row that is open
  const numbers = pairs => {
    const list = make("dl", "numbers");
    for (const [name, value] of pairs) {
      if (value === "") continue;
      const item = make("div");
      item.append(make("dt", "", name), make("dd", "", value));
      list.append(item);
    }
    return list;
  };
  const details = (row, table) => numbers(table.details.map(({ key, name, kind }) => [name, written(row[key], kind)]));
  const turn = (role, { text, characters }) => {
    const box = make("div", "turn");
    const speech = make("div", "speech", text);
    speech.dir = "auto";
    speech.tabIndex = text.length > 600 ? 0 : -1;
    box.append(make("span", "role", role), speech);
    if (characters > text.length) {
      box.append(make("p", "shortened", `truncated: ${write.count(characters)} characters in all`));
    }
    return box;
  };
  const coloured = row => {
    const box = make("div", "turn");
    const text = make("div", "speech");
    text.dir = "auto";
    const largest = Math.max(...row.token_scores.map(([, score]) => Math.abs(score)), 1e-30);
    for (const [word, score] of row.token_scores) {
      const piece = make("span", "", word);
      const strength = (0.6 * Math.sqrt(Math.abs(score) / largest)).toFixed(2);
      piece.style.backgroundColor = `rgba(var(--${score < 0 ? "minus" : "plus"}), ${strength})`;
      piece.title = write.score(score);
      text.append(piece);
    }
    box.append(make("span", "role", "supervised tokens"), text);
    for (const [side, words] of [["plus", "raises the score"], ["minus", "lowers it"]]) {
      const key = make("span", "key");
      const swatch = make("i");
      swatch.style.backgroundColor = `rgba(var(--${side}), .6)`;
      key.append(swatch, words + "\u00a0\u00a0");
      box.append(key);
    }
    if (row.hidden_tokens) box.append(make("p", "shortened", `${write.count(row.hidden_tokens)} more tokens are not shown`));
    return box;
  };
  const opened = {
    example(row, table) {
      const parts = [];
      if (row.missing) parts.push(make("p", "shortened", row.missing));
      for (const each of row.turns) parts.push(turn(each.role, each));
      if (row.token_scores.length) parts.push(coloured(row));
      parts.push(details(row, table));
      return parts;
    },
    pair(row, table) {
      const parts = [turn("prompt", { text: row.prompt, characters: row.prompt.length })];
      for (const side of ["chosen", "rejected"]) for (const each of row[side]) parts.push(turn(side, each));
      parts.push(details(row, table));
      return parts;
    },
  };

  // ------------------------------------------------------------------ tables
  const lowerCase = value => String(value ?? "").toLowerCase();
  const haystack = row => lowerCase([row.id, row.source, row.verdict, row.target, row.prompt, row.text, ...(row.turns ?? []).map(each => each.text)].join("\n"));

  const build = host => {
    const table = data.tables[host.dataset.table];
    const state = { words: "", group: "", by: table.sort[0], falling: table.sort[1] };
    table.rows.forEach(row => { row.haystack = haystack(row); });
    const id = name => `${host.dataset.table}-${name}`;

    const tools = make("div", "tools");
    const search = make("input");
    Object.assign(search, { type: "search", id: id("search"), autocomplete: "off", spellcheck: false });
    const searching = make("label", "", "Search these rows");
    searching.htmlFor = search.id;
    searching.append(search);
    tools.append(searching);
    const groups = [...new Set(table.rows.map(row => row.group))];
    const choice = make("select");
    if (groups.length > 1) {
      choice.id = id("group");
      choice.append(new Option("all of them", ""), ...groups.map(name => new Option(name, name)));
      const choosing = make("label", "", table.group);
      choosing.htmlFor = choice.id;
      choosing.append(choice);
      tools.append(choosing);
    }
    const count = make("output");
    count.setAttribute("aria-live", "polite");
    tools.append(count);

    const list = make("div", "list");
    Object.assign(list, { tabIndex: 0 });
    list.setAttribute("role", "region");
    list.setAttribute("aria-label", host.dataset.label);
    const grid = make("table");
    const head = make("thead");
    const line = make("tr");
    const body = make("tbody");
    for (const column of table.columns) {
      const cell = make("th", `${column.kind === "name" || column.kind === "text" ? "" : "number"} ${column.wide ? "wide" : ""}`.trim());
      cell.scope = "col";
      cell.dataset.key = column.key;
      const button = make("button", "", column.name);
      button.type = "button";
      button.addEventListener("click", () => {
        const words = column.kind === "name" || column.kind === "text";
        state.falling = state.by === column.key ? !state.falling : !words && !column.key.startsWith("rank");
        state.by = column.key;
        show();
      });
      cell.append(button);
      line.append(cell);
    }
    head.append(line);
    grid.append(make("caption", "unseen", host.dataset.label), head, body);
    list.append(grid);
    host.append(tools, list);

    const toggle = (row, node, button) => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      node.classList.toggle("open", open);
      if (!open) { node.nextSibling.remove(); return; }
      const detail = make("tr", "detail");
      const cell = make("td");
      cell.colSpan = table.columns.length;
      cell.append(...opened[table.kind](row, table));
      detail.append(cell);
      node.after(detail);
    };
    const drawRow = row => {
      const node = make("tr", "row");
      for (const column of table.columns) {
        const numeric = column.kind !== "name" && column.kind !== "text";
        const cell = make("td", `${numeric ? "number" : column.kind} ${column.wide ? "wide" : ""}`.trim());
        if (column.kind === "text") {
          const button = make("button", "opener", row[column.key] || "(no text)");
          button.type = "button";
          button.dir = "auto";
          button.setAttribute("aria-expanded", "false");
          cell.append(button);
          node.addEventListener("click", event => { if (!getSelection().toString() || event.target === button) toggle(row, node, button); });
          button.addEventListener("keydown", event => {
            const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
            if (!step) return;
            const all = [...body.querySelectorAll(".opener")];
            const next = all[all.indexOf(button) + step];
            if (next) { event.preventDefault(); next.focus(); }
          });
        } else {
          cell.textContent = written(row[column.key], column.kind);
          if (!numeric) cell.dir = "auto";
        }
        node.append(cell);
      }
      return node;
    };
    const drawNone = () => {
      const node = make("tr");
      const cell = make("td", "", "No row here has all of these words.");
      cell.colSpan = table.columns.length;
      node.append(cell);
      return node;
    };
    const show = () => {
      const words = lowerCase(state.words).split(/\s+/).filter(Boolean);
      const found = table.rows.filter(row => (!state.group || row.group === state.group) && words.every(word => row.haystack.includes(word)));
      const sign = state.falling ? -1 : 1;
      found.sort((a, b) => {
        const [x, y] = [a[state.by], b[state.by]];
        if (typeof x === "string" || typeof y === "string") return sign * lowerCase(x).localeCompare(lowerCase(y));
        return isNumber(x) && isNumber(y) ? sign * (x - y) : isNumber(x) ? -1 : isNumber(y) ? 1 : 0;
      });
      for (const cell of line.children) {
        if (cell.dataset.key === state.by) cell.setAttribute("aria-sort", state.falling ? "descending" : "ascending");
        else cell.removeAttribute("aria-sort");
      }
      body.replaceChildren(...(found.length ? found.map(drawRow) : [drawNone()]));
      count.textContent = `${write.count(found.length)} of ${write.count(table.rows.length)} shown`;
    };
    search.addEventListener("input", () => { state.words = search.value; show(); });
    choice.addEventListener("change", () => { state.group = choice.value; show(); });
    show();
  };
  document.querySelectorAll("[data-table]").forEach(build);

  // ------------------------------------------------------------------ where the reader is
  const links = new Map([...document.querySelectorAll(".contents a")].map(link => [link.hash.slice(1), link]));
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      links.forEach(link => link.removeAttribute("aria-current"));
      links.get(entry.target.id)?.setAttribute("aria-current", "true");
    }
  }, { rootMargin: "-20% 0px -70% 0px" });
  document.querySelectorAll("main > section").forEach(section => seen.observe(section));
  document.body.dataset.ready = "tables";
  drawn.then(() => { document.body.dataset.ready = "all"; });
})();

"use strict";
// Filters the rows that the page holds. The state stands in the address (#flips=broke&q=word), so a view can be linked.
(() => {
  const list = document.getElementById("flip-list");
  if (!list) return;
  const PER_PAGE = 10;
  const more = document.getElementById("flip-more");
  list.append(more.content);
  const cards = [...list.children].map((card) => ({
    card, state: card.dataset.state, contest: card.dataset.contest, slices: card.dataset.slices.split(" "), text: null,
  }));
  const controls = document.getElementById("flip-controls");
  const buttons = [...controls.querySelectorAll("button[data-state]")];
  const fields = ["contest", "slice", "q"].map((name) => document.getElementById(`flip-${name}`)).filter(Boolean);
  const said = document.getElementById("flip-said");
  const [back, next] = ["flip-back", "flip-next"].map((id) => document.getElementById(id));
  controls.hidden = false;
  document.getElementById("flip-pages").hidden = false;
  document.getElementById("flip-static").remove();

  const state = { flips: "all", contest: "", slice: "", q: "", page: 1 };

  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    if (!given.has("flips")) return false;
    for (const name of ["flips", "contest", "slice", "q"]) state[name] = given.get(name) || "";
    state.page = Math.max(1, parseInt(given.get("page"), 10) || 1);
    if (!buttons.some((button) => button.dataset.state === state.flips)) state.flips = "all";
    return true;
  }

  function remember() {
    const words = new URLSearchParams({ flips: state.flips });
    for (const name of ["contest", "slice", "q"]) if (state[name]) words.set(name, state[name]);
    if (state.page > 1) words.set("page", state.page);
    try { history.replaceState(null, "", `#${words}`); } catch { /* a viewer may forbid it; the filter works without */ }
  }

  function textOf(one) {
    one.text ??= one.card.textContent.toLowerCase();
    return one.text;
  }

  function show() {
    const wanted = state.q.trim().toLowerCase();
    const found = cards.filter((one) =>
      (state.flips === "all" || one.state === state.flips) &&
      (!state.contest || one.contest === state.contest) &&
      (!state.slice || one.slices.includes(state.slice)) &&
      (!wanted || textOf(one).includes(wanted)));
    const pages = Math.max(1, Math.ceil(found.length / PER_PAGE));
    state.page = Math.min(state.page, pages);
    const first = (state.page - 1) * PER_PAGE;
    const shown = new Set(found.slice(first, first + PER_PAGE));
    for (const one of cards) one.card.hidden = !shown.has(one);
    for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset.state === state.flips));
    for (const field of fields) if (field.value !== state[field.name]) field.value = state[field.name];
    said.textContent = found.length
      ? `Rows ${first + 1} to ${first + shown.size} of ${found.length.toLocaleString("en")}`
      : "No row here is like that";
    back.disabled = state.page <= 1;
    next.disabled = state.page >= pages;
  }

  function change(values) {
    Object.assign(state, { page: 1 }, values);
    show();
    remember();
  }

  for (const button of buttons) button.addEventListener("click", () => change({ flips: button.dataset.state }));
  for (const field of fields) field.addEventListener("input", () => change({ [field.name]: field.value }));
  const turn = (step) => () => {
    change({ page: state.page + step });
    controls.scrollIntoView({ block: "start" });
  };
  back.addEventListener("click", turn(-1));
  next.addEventListener("click", turn(1));
  addEventListener("hashchange", () => read() && show());
  if (read()) document.getElementById("flips").scrollIntoView();
  show();
})();

// @ts-check
"use strict";
// The trajectory browser: a paged list of prompt groups and the one that is open. Nothing else of the rollouts is in
// the page's tree, so its size does not grow with the dump.

/**
 * @typedef {object} Call
 * @property {string} tool
 * @property {Record<string, unknown>} arguments
 * @property {string | null} result
 * @property {boolean} ok
 * @property {string} status
 * @property {"witness" | "failing" | "none"} role
 * @property {"corrected" | "below_alpha" | "below_theta" | "no_witness" | ""} gate
 * @property {number | null} similarity
 * @property {number | null} support
 * @property {number | null} alpha
 * @property {number | null} [lift] of its reference group
 * @property {boolean} [lucky] its witnesses are: rollouts that hold the call succeed no more often than their siblings
 * @property {boolean} [inexact] misassigned, and equal to no witness, only similar
 * @property {number | null} reference_advantage
 * @property {number | null} transfer
 * @property {number} before advantage
 * @property {number} after
 * @property {[number, number] | null} span of the turn, in characters of the trajectory's text
 * @property {[number, number] | null} call_span
 * @property {{ trajectory: number, call: number } | null} witness
 *
 * @typedef {{ name: string, score: number, success: boolean, advantage: number, text: string, calls: Call[] }} Trajectory
 * @typedef {{ step: number, uid: string, prompt: string, ground_truth: unknown, interest: number, trajectories: Trajectory[] }} Group
 * @typedef {{ group: number, trajectory: number | null, call: number | null }} Place
 *
 * @typedef {object} Filter
 * @property {RegExp | null} search
 * @property {string} step "" is any, here and below
 * @property {string} tool
 * @property {string} gate
 * @property {string} role
 * @property {string} success "yes", "no" or ""
 */

/** @type {Record<string, string>} */
const GATES = {
  corrected: "corrected",
  below_alpha: "below alpha_min",
  below_theta: "below theta",
  no_witness: "no witness",
};
/** @type {Record<string, string>} */
const ROLES = { failing: "failing", witness: "witness", none: "takes no part" };
const GATE_SIGNS = { corrected: "▲", below_alpha: "◇", below_theta: "≠", no_witness: "○", "": "" };

const GROUPS_PER_PAGE = 20;
const ROLLOUTS_AT_ONCE = 16;
const CALLS_AT_ONCE = 40; // of one rollout
const MOST_ARGUMENTS = 40; // of one call; "As written" has them all

/** @param {unknown} value */
function plain(value) {
  if (typeof value === "string") return value;
  const line = JSON.stringify(value) ?? "";
  return line.length < 60 ? line.replaceAll(",", ", ") : JSON.stringify(value, null, 1);
}

/**
 * What a prompt asks: its last user turn, without the template's roles.
 * @param {string} prompt
 */
function question(prompt) {
  const last = prompt.split(/(?:^|\n)(?:<\|im_start\|>)?user\n/).pop() ?? "";
  const asked = last.replace(/(?:<\|im_end\|>)?\s*(?:(?:<\|im_start\|>)?assistant\s*)?$/, "").trim();
  return asked || prompt.trim() || "(empty prompt)";
}

/** @param {string} text @param {number} size */
function cut(text, size) {
  return text.length > size ? `${text.slice(0, size).replace(/[\ud800-\udbff]$/, "")}…` : text;
}

/**
 * Positions in characters (code points) as positions in a JavaScript string.
 * @param {string} text
 * @returns {(position: number) => number}
 */
function characterPositions(text) {
  if (!/[\ud800-\udfff]/.test(text)) return (position) => position;
  /** @type {number[]} */
  const positions = [];
  let at = 0;
  for (const character of text) {
    positions.push(at);
    at += character.length;
  }
  return (position) => positions[position] ?? text.length;
}

/** @param {Place} place */
function linkTo({ group, trajectory, call }) {
  return `#g${group}${trajectory === null ? "" : `t${trajectory}`}${call === null ? "" : `c${call}`}`;
}

/** @param {string} hash @returns {Place | null} */
function placeOf(hash) {
  const match = /^#g(\d+)(?:t(\d+)(?:c(\d+))?)?$/.exec(hash);
  const number = (/** @type {string | undefined} */ digits) => (digits === undefined ? null : Number(digits));
  return match && { group: Number(match[1]), trajectory: number(match[2]), call: number(match[3]) };
}

/**
 * @param {Call} call
 * @param {Filter} filter
 */
function callMatches(call, { tool, gate, role }) {
  const passed = gate === "lucky" || gate === "inexact" ? Boolean(call[gate]) : call.gate === gate;
  return (!tool || call.tool === tool) && (!gate || passed) && (!role || call.role === role);
}

/**
 * The trajectories of a group that match, none where the group does not.
 * @param {Group} group
 * @param {Filter} filter
 */
function matching(group, filter) {
  if (filter.step && String(group.step) !== filter.step) return [];
  const { search, success } = filter;
  const byCall = filter.tool || filter.gate || filter.role;
  const inPrompt = search?.test(group.prompt) || search?.test(plain(group.ground_truth));
  return group.trajectories.filter(
    ({ success: right, calls, text }) =>
      (!success || right === (success === "yes")) &&
      (!byCall || calls.some((call) => callMatches(call, filter))) &&
      (!search || inPrompt || search.test(text) || calls.some((call) => callHas(call, search))),
  );
}

/**
 * @param {Call} call
 * @param {RegExp} search
 */
function callHas(call, search) {
  return search.test(call.tool) || search.test(call.result ?? "") || Object.values(call.arguments).some((value) => search.test(plain(value)));
}

/**
 * Colours text by its advantage: blue for praise, orange for blame, stronger the larger it is. The number stands beside.
 * @template {HTMLElement} T
 * @param {T} node
 * @param {number} before
 * @param {number} after
 */
function tint(node, before, after) {
  node.classList.add("tinted");
  for (const [name, value] of /** @type {[string, number][]} */ ([["before", before], ["after", after]])) {
    node.style.setProperty(`--${name}`, `var(--${value < 0 ? "blame" : "praise"})`);
    node.style.setProperty(`--${name}-strength`, `${Math.min(1, Math.abs(value) / 2) * 100}%`);
  }
  return node;
}

/**
 * @param {number} before
 * @param {number} after
 */
function advantage(before, after) {
  const changed = before !== after;
  return html(
    "span",
    { class: "advantage" },
    "advantage ",
    html("b", {}, signed(before)),
    changed && html("span", {}, html("span", { "aria-hidden": "true" }, " → "), html("span", { class: "unseen" }, " becomes "), html("b", {}, signed(after))),
  );
}

class Browser {
  /**
   * @param {Group[]} groups
   * @param {Summary["settings"]} settings
   */
  constructor(groups, settings) {
    this.groups = groups;
    this.settings = settings;
    /** @type {Filter} */
    this.filter = { search: null, step: "", tool: "", gate: "", role: "", success: "" };
    /** Positions of the groups that match, the most interesting first. @type {number[]} */
    this.listed = [];
    this.page = 0;
    /** @type {Place | null} */
    this.place = null;
    /** How much of the open group is drawn; `calls` of each rollout. */
    this.drawn = { rollouts: ROLLOUTS_AT_ONCE, calls: CALLS_AT_ONCE };
    /** For each call of the open group that is a witness, the calls it speaks for. @type {Map<string, Place[]>} */
    this.speaksFor = new Map();
    byId("page-before").addEventListener("click", () => this.showPage(this.page - 1));
    byId("page-after").addEventListener("click", () => this.showPage(this.page + 1));
    // A link to where one is already changes no hash, yet should lead there.
    byId("main").addEventListener("click", (event) => {
      const link = event.target instanceof Element ? event.target.closest("a[href^='#g']") : null;
      if (!link || !(event instanceof MouseEvent) || event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      const place = placeOf(link.getAttribute("href") ?? "");
      if (place) this.go(place);
    });
  }

  /**
   * Lists what matches and says how much that is.
   * @param {Filter} filter
   */
  apply(filter) {
    this.filter = filter;
    let trajectories = 0;
    this.listed = [];
    this.groups.forEach((group, index) => {
      const found = matching(group, filter).length;
      trajectories += found;
      if (found) this.listed.push(index);
    });
    this.listed.sort((a, b) => this.groups[b].interest - this.groups[a].interest || a - b);
    const [shown, all] = [this.listed.length, this.groups.length];
    byId("found").textContent = shown
      ? `${count(shown)} of ${counted(all, "prompt group")} with ${counted(trajectories, "matching rollout")}`
      : all ? "No prompt group matches these filters." : "This report holds no trajectories.";
    this.showPage(0);
  }

  /** @param {number} page */
  showPage(page) {
    const pages = Math.max(1, Math.ceil(this.listed.length / GROUPS_PER_PAGE));
    this.page = Math.min(Math.max(page, 0), pages - 1);
    const first = this.page * GROUPS_PER_PAGE;
    const list = byId("group-list");
    list.setAttribute("start", String(first + 1));
    list.replaceChildren(...this.listed.slice(first, first + GROUPS_PER_PAGE).map((index) => this.listItem(index)));
    byId("pager").hidden = pages === 1;
    byId("page-number").textContent = `Page ${this.page + 1} of ${pages}`;
    byId("page-before").toggleAttribute("disabled", this.page === 0);
    byId("page-after").toggleAttribute("disabled", this.page === pages - 1);
  }

  /** @param {number} index */
  listItem(index) {
    const group = this.groups[index];
    const right = group.trajectories.filter(({ success }) => success).length;
    const calls = group.trajectories.flatMap((trajectory) => trajectory.calls);
    const failing = calls.filter(({ role }) => role === "failing").length;
    const corrected = calls.filter(({ gate }) => gate === "corrected").length;
    return html(
      "li",
      {},
      html(
        "a",
        { href: linkTo({ group: index, trajectory: null, call: null }), "aria-current": index === this.place?.group && "true" },
        html("span", { class: "asked", dir: "auto" }, shown(cut(question(group.prompt), 140), this.filter.search)),
        html(
          "span",
          { class: "facts" },
          `Step ${count(group.step)} · ${right} of ${group.trajectories.length} right · ${counted(failing, "failing call")}, ${count(corrected)} corrected`,
        ),
      ),
    );
  }

  /**
   * Opens a place, shows it in the list and in the address, and moves the focus there.
   * @param {Place} place
   */
  go(place) {
    history.pushState(null, "", linkTo(place));
    this.open(place, true);
  }

  /**
   * @param {Place} place
   * @param {boolean} focus
   */
  open(place, focus) {
    const group = this.groups[place.group];
    if (!group) return;
    const box = byId("group");
    const { trajectory, call } = place;
    if (this.place?.group !== place.group) this.drawn = { rollouts: ROLLOUTS_AT_ONCE, calls: CALLS_AT_ONCE };
    const { rollouts, calls } = this.drawn;
    this.drawn = { rollouts: Math.max(rollouts, (trajectory ?? 0) + 1), calls: Math.max(calls, (call ?? 0) + 1) };
    const isDrawn = this.place?.group === place.group && this.drawn.rollouts === rollouts && this.drawn.calls === calls;
    this.place = place;
    if (!isDrawn) this.render();
    const position = this.listed.indexOf(place.group);
    if (position >= 0) this.showPage(Math.floor(position / GROUPS_PER_PAGE));
    const current = document.querySelector("#group-list [aria-current]");
    if (current instanceof HTMLElement && current.parentElement) {
      const list = byId("group-list");
      const top = current.parentElement.offsetTop - list.offsetTop;
      if (top < list.scrollTop || top + current.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - 40;
    }

    for (const marked of box.querySelectorAll(".selected, .its-witness")) {
      marked.classList.remove("selected", "its-witness");
      marked.removeAttribute("aria-current");
    }
    let target = byId(linkTo({ ...place, call: null }).slice(1)) ?? box.querySelector("h3");
    if (trajectory !== null && call !== null) {
      const card = byId(linkTo(place).slice(1));
      const witness = group.trajectories[trajectory]?.calls[call]?.witness;
      if (card) {
        card.classList.add("selected");
        card.setAttribute("aria-current", "true");
        target = card;
      }
      if (witness) byId(linkTo({ group: place.group, ...witness }).slice(1))?.classList.add("its-witness");
    }
    if (focus && target instanceof HTMLElement) {
      target.focus({ preventScroll: true });
      target.scrollIntoView({ block: trajectory === null ? "start" : "nearest", inline: "nearest" });
    }
  }

  /** Draws the open group. */
  render() {
    const index = /** @type {Place} */ (this.place).group;
    const group = this.groups[index];
    this.speaksFor.clear();
    group.trajectories.forEach(({ calls }, trajectory) =>
      calls.forEach(({ witness }, call) => {
        if (!witness) return;
        const key = linkTo({ group: index, ...witness });
        if (!this.speaksFor.has(key)) this.speaksFor.set(key, []);
        this.speaksFor.get(key)?.push({ group: index, trajectory, call });
      }),
    );
    const asked = question(group.prompt);
    const right = group.trajectories.filter(({ success }) => success).length;
    const box = byId("group");
    box.replaceChildren(
      html("h3", { id: `g${index}`, tabindex: -1, dir: "auto" }, shown(cut(asked, 300), this.filter.search)),
      html(
        "p",
        { class: "facts" },
        `Training step ${count(group.step)} · ${right} of ${counted(group.trajectories.length, "rollout")} right · group ${index + 1} `,
        html("span", { class: "uid" }, shown(cut(group.uid, 200))),
      ),
      ...(group.ground_truth === null ? [] : [html("p", { class: "facts" }, "Expected: ", html("b", { dir: "auto" }, shown(cut(plain(group.ground_truth), 300), this.filter.search)))]),
      folded("Whole prompt", () => longText(group.prompt, { limit: 4000, search: this.filter.search, label: "prompt" })),
      this.rolloutsOf(group, index),
    );
  }

  /**
   * The siblings side by side, the first of them at once.
   * @param {Group} group
   * @param {number} index
   */
  rolloutsOf(group, index) {
    const matched = new Set(matching(group, this.filter));
    const row = html("div", { class: "siblings", tabindex: 0, role: "region", "aria-label": "Rollouts of this prompt, side by side" });
    const drawn = group.trajectories.slice(0, this.drawn.rollouts);
    row.append(...drawn.map((trajectory, t) => this.rollout(trajectory, index, t, matched.has(trajectory))));
    const left = group.trajectories.length - drawn.length;
    return html("div", {}, row, left > 0 && this.more(counted(left, "rollout"), { group: index, trajectory: drawn.length, call: null }));
  }

  /**
   * A button that draws more of the open group.
   * @param {string} left what is not drawn yet
   * @param {Place} first the first of it
   */
  more(left, first) {
    const button = html("button", { type: "button" }, `Show more (${left} left)`);
    button.addEventListener("click", () => {
      const part = first.call === null ? "rollouts" : "calls";
      this.drawn[part] += part === "calls" ? CALLS_AT_ONCE : ROLLOUTS_AT_ONCE;
      this.render();
      this.go(first);
    });
    return button;
  }

  /**
   * @param {Trajectory} trajectory
   * @param {number} group
   * @param {number} t
   * @param {boolean} matches
   */
  rollout(trajectory, group, t, matches) {
    const { text, calls, success } = trajectory;
    const { search } = this.filter;
    const id = `g${group}t${t}`;
    const body = html("div", { class: "turns" });
    const position = characterPositions(text);
    let at = 0;
    for (const turn of this.turns(calls.slice(0, this.drawn.calls))) {
      const [start, end] = (turn[0].call.span ?? [0, 0]).map(position);
      if (start > at) body.append(this.between(text.slice(at, start)));
      body.append(this.turn(trajectory, turn, { group, t, start: Math.max(start, at), end, position }));
      at = Math.max(at, end);
    }
    const left = calls.length - this.drawn.calls;
    if (left > 0) body.append(this.more(counted(left, "call"), { group, trajectory: t, call: this.drawn.calls }));
    const rest = text.slice(at);
    const spoken = at ? rest.lastIndexOf("assistant\n") : -1;
    const answer = spoken < 0 ? rest : rest.slice(spoken + "assistant\n".length);
    if (spoken > 0) body.append(this.between(rest.slice(0, spoken)));
    if (answer.trim()) {
      const block = html("section", { class: "turn" }, html("h5", {}, "Last turn"), advantage(trajectory.advantage, trajectory.advantage));
      block.append(longText(answer.trim(), { search, label: "last turn" }));
      body.append(tint(block, trajectory.advantage, trajectory.advantage));
    }
    return html(
      "article",
      { class: matches ? "rollout" : "rollout beside", "aria-labelledby": id },
      html(
        "header",
        {},
        html("h4", { id, tabindex: -1 }, `Rollout ${t + 1}`, html("span", { class: success ? "verdict right" : "verdict wrong" }, success ? "✓ right" : "✗ wrong")),
        html("p", { class: "facts" }, `score ${decimal(trajectory.score)} · `, advantage(trajectory.advantage, trajectory.advantage), matches ? null : " · does not match the filters"),
        html("p", { class: "uid" }, shown(cut(trajectory.name, 200))),
      ),
      body,
    );
  }

  /**
   * Calls by turn, in order.
   * @param {Call[]} calls
   */
  turns(calls) {
    /** @type {Map<string, { call: Call, c: number }[]>} */
    const turns = new Map();
    calls.forEach((call, c) => {
      const key = call.span ? String(call.span) : `call ${c}`;
      if (!turns.has(key)) turns.set(key, []);
      turns.get(key)?.push({ call, c });
    });
    return [...turns.values()];
  }

  /**
   * What stands between two turns with calls: tool results, mostly.
   * @param {string} text
   */
  between(text) {
    const hit = this.filter.search?.test(text) ? ", a match" : "";
    const part = folded(`Text between, ${counted(text.length, "character")}${hit}`, () =>
      longText(text, { search: this.filter.search, label: "text between turns" }),
    );
    part.classList.add("between");
    return part;
  }

  /**
   * A turn with calls: what the model wrote, with a card in place of each call.
   * @param {Trajectory} trajectory
   * @param {{ call: Call, c: number }[]} calls
   * @param {{ group: number, t: number, start: number, end: number, position: (position: number) => number }} where
   */
  turn(trajectory, calls, { group, t, start, end, position }) {
    const { before, after } = calls[0].call;
    const block = html("div", { class: "turn" });
    let at = start;
    /** @param {number} until */
    const prose = (until) => {
      const said = trajectory.text.slice(at, until).replace(/^\s*<\/tool_call>|<tool_call>\s*$/g, "").trim();
      if (said) block.append(longText(said, { search: this.filter.search, label: "turn" }));
      at = Math.max(at, until);
    };
    for (const { call, c } of calls) {
      const [from, to] = (call.call_span ?? [at, at]).map(position);
      prose(from);
      block.append(this.card(call, { group, trajectory: t, call: c }, trajectory.text.slice(from, to)));
      at = Math.max(at, to);
    }
    prose(end);
    return tint(block, before, this.settings.token_scope === "call" ? before : after);
  }

  /**
   * @param {Call} call
   * @param {Place} place
   * @param {string} raw the call as the model wrote it
   */
  card(call, place, raw) {
    const id = linkTo(place).slice(1);
    const { search } = this.filter;
    const given = Object.entries(call.arguments);
    const state = call.role === "failing" ? call.gate : "";
    const card = html(
      "section",
      { class: `call ${call.role} ${state}`, id, tabindex: -1, "aria-labelledby": `${id}-title` },
      html(
        "h5",
        { id: `${id}-title` },
        html("span", {}, `Call ${/** @type {number} */ (place.call) + 1}:`),
        " ",
        html("span", { class: "tool" }, shown(cut(call.tool, 200), search)),
        html("a", { class: "permalink", href: `#${id}`, "aria-label": `Link to call ${id}` }, "#"),
      ),
      html(
        "p",
        { class: "state" },
        html("span", { class: "badge" }, call.role === "failing" ? `${GATE_SIGNS[call.gate]} ${GATES[call.gate] ?? "failing"}` : call.role === "witness" ? "★ witness" : ROLES[call.role]),
        call.lucky && html("span", { class: "badge broken" }, "⚠ lucky witness"),
        call.inexact && html("span", { class: "badge" }, "≈ only similar"),
        !call.ok && html("span", { class: "badge broken" }, "✗ ", spelled(cut(call.status, 80).replaceAll("_", " "))),
        advantage(call.before, call.after),
      ),
      html(
        "dl",
        { class: "arguments" },
        ...given.slice(0, MOST_ARGUMENTS).map(([name, value]) =>
          html("div", {}, html("dt", {}, shown(cut(name, 80), search)), html("dd", {}, longText(plain(value), { limit: 300, search, label: "argument" }))),
        ),
      ),
      given.length > MOST_ARGUMENTS && html("p", { class: "why" }, `and ${count(given.length - MOST_ARGUMENTS)} more arguments`),
      html("p", { class: "why" }, this.why(call)),
      this.figures(call),
      this.witnessOf(call, place),
      this.heardBy(place),
      call.result !== null && call.result !== "" && html("div", { class: "result" }, html("h6", {}, "Result"), longText(call.result, { limit: 220, search, label: "result" })),
      raw !== "" && folded("As written", () => longText(raw, { search, label: "call" })),
    );
    return tint(card, call.before, call.after);
  }

  /**
   * Why a call was corrected or was not.
   * @param {Call} call
   */
  why({ role, gate, similarity, alpha, before, after, ok }) {
    const { theta, alpha_min } = this.settings;
    if (role === "witness") return "In a rollout that succeeded with a positive advantage: it can speak for its like.";
    if (role === "none") return ok ? "No part in the rule: its tool or its rollout does not count." : "Calls that did not run give and receive no credit.";
    if (gate === "corrected") {
      return before === after
        ? "Passed both gates; its tokens stay as they are, since another call of the same turn got no credit."
        : "A successful sibling made this call too: part of the blame is taken back.";
    }
    if (gate === "below_alpha") return `Matched, but confidence ${decimal(alpha)} is below alpha_min ${alpha_min}: too few successes made this call.`;
    if (gate === "below_theta") return `The nearest call of a success has similarity ${decimal(similarity)}, below theta ${theta}.`;
    return "No successful sibling used this tool.";
  }

  /** @param {Call} call */
  figures({ role, similarity, support, alpha, lift, reference_advantage, transfer }) {
    if (role !== "failing") return null;
    /** @type {[string, string][]} */
    const figures = [
      ["similarity", decimal(similarity)],
      ["support", decimal(support)],
      ["alpha", decimal(alpha)],
      ["lift", signed(lift ?? null)],
      ["reference advantage", signed(reference_advantage)],
      ["transfer", signed(transfer)],
    ];
    return html("dl", { class: "figures" }, ...figures.map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))));
  }

  /**
   * @param {Call} call
   * @param {Place} place
   */
  witnessOf({ witness }, { group }) {
    return witness && html("p", { class: "witness-link" }, html("a", { href: linkTo({ group, ...witness }) }, `★ Its witness: ${this.nameOf(witness)}`));
  }

  /** @param {Place} place */
  heardBy(place) {
    const calls = this.speaksFor.get(linkTo(place));
    if (!calls) return null;
    const links = calls.slice(0, 8).map((call) => html("a", { href: linkTo(call) }, this.nameOf(call)));
    return html(
      "p",
      { class: "witness-link" },
      "Speaks for ",
      ...links.flatMap((link, k) => (k ? [", ", link] : [link])),
      calls.length > links.length && ` and ${count(calls.length - links.length)} more`,
    );
  }

  /** @param {{ trajectory: number | null, call: number | null }} place */
  nameOf({ trajectory, call }) {
    return `rollout ${(trajectory ?? 0) + 1}, call ${(call ?? 0) + 1}`;
  }

  /**
   * The next (1) or previous (-1) prompt group of the list.
   * @param {1 | -1} direction
   */
  moveGroup(direction) {
    const at = this.place ? this.listed.indexOf(this.place.group) : -1;
    const next = this.listed[at < 0 ? 0 : at + direction];
    if (next !== undefined) this.go({ group: next, trajectory: null, call: null });
  }

  /**
   * The next or previous call of the open group, of those that match where any does.
   * @param {1 | -1} direction
   */
  moveCall(direction) {
    if (!this.place) return;
    const index = this.place.group;
    const group = this.groups[index];
    const matched = new Set(matching(group, this.filter));
    /** @type {Place[]} */
    let places = [];
    group.trajectories.forEach((trajectory, t) => trajectory.calls.forEach((_, c) => places.push({ group: index, trajectory: t, call: c })));
    const wanted = places.filter(({ trajectory, call }) => {
      const holder = group.trajectories[/** @type {number} */ (trajectory)];
      return matched.has(holder) && callMatches(holder.calls[/** @type {number} */ (call)], this.filter);
    });
    if (wanted.length) places = wanted;
    const { trajectory, call } = this.place;
    /** @type {(place: Place) => number} */
    const order = (place) => (place.trajectory ?? 0) * 1e6 + (place.call ?? (place.trajectory === null ? -1 : -0.5));
    const here = order({ group: index, trajectory: trajectory ?? null, call });
    const next = direction > 0 ? places.find((place) => order(place) > here) : places.reverse().find((place) => order(place) < here);
    if (next) this.go(next);
  }

  /** From the selected call to its witness. */
  moveToWitness() {
    if (!this.place || this.place.trajectory === null || this.place.call === null) return;
    const witness = this.groups[this.place.group].trajectories[this.place.trajectory]?.calls[this.place.call]?.witness;
    if (witness) this.go({ group: this.place.group, ...witness });
  }
}

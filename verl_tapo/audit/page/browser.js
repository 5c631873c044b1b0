// @ts-check
"use strict";
// The trajectory browser: a paged list of prompt groups and the one that is open. Nothing else of the rollouts is in
// the page's tree, so its size does not grow with the dump.

/**
 * @typedef {object} Call
 * @property {string} tool
 * @property {Record<string, unknown>} arguments
 * @property {string | null} result
 * @property {boolean | null} [seen] the result held an accepted answer; null: it cannot be told
 * @property {string | null} [found] that answer, as it stands there
 * @property {boolean} ok
 * @property {string} status
 * @property {"witness" | "failing" | "none"} role
 * @property {"corrected" | "below_alpha" | "below_theta" | "no_witness" | ""} gate
 * @property {boolean} matched it has an equivalent call in a successful rollout
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
 * @property {{ trajectory: number, call: number } | null} witness of a matched call, and below theta the nearest call
 *
 * @typedef {{ name: string, score: number, success: boolean, grounded?: boolean | null, advantage: number, text: string, calls: Call[] }} Trajectory
 * @typedef {{ step: number, uid: string, prompt: string, ground_truth: unknown, interest: number, trajectories: Trajectory[] }} Group
 * @typedef {{ group: number, trajectory: number | null, call: number | null }} Place
 *
 * @typedef {{ calls: { call: Call, c: number }[], said: string, draw: () => Child[] }} Folded Calls that do not match.
 *
 * @typedef {object} Filter
 * @property {RegExp | null} search
 * @property {string} step "" is any, here and below
 * @property {string} tool
 * @property {string} gate
 * @property {string} role
 * @property {string} success "yes", "no" or ""
 * @property {string} grounding "true", "false", "null" or ""
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
/** Whether a rollout's tools found an accepted answer. @type {Record<string, string>} */
const GROUNDINGS = { true: "grounded", false: "ungrounded", null: "cannot tell" };
const GATE_SIGNS = { corrected: "▲", below_alpha: "◇", below_theta: "≠", no_witness: "○", "": "" };

const GROUPS_PER_PAGE = 20;
const ROLLOUTS_AT_ONCE = 16;
const CALLS_AT_ONCE = 40; // of one rollout
const MOST_ARGUMENTS = 40; // of one call; "As written" has them all

/** @param {unknown} value */
function plain(value) {
  if (typeof value === "string") return value;
  const spread = JSON.stringify(value, null, 1) ?? "";
  const line = spread.replace(/(?<=[[{])\n *|\n *(?=[\]}])/g, "").replace(/\n */g, " "); // strings hold no bare line ends
  return line.length < 80 ? line : spread;
}

const MOST_ACCEPTED = 12;

/**
 * Accepted answers as a reader says them: several with "or", named ones with their name.
 * @param {unknown} truth
 * @returns {string[]}
 */
function accepted(truth) {
  if (Array.isArray(truth)) return truth.flatMap(accepted);
  if (truth === null || typeof truth !== "object") return [plain(truth)];
  return Object.entries(truth).map(([name, value]) => `${name}: ${accepted(value).join(" or ")}`);
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

/** @param {Call} call */
function stateOf({ role, gate }) {
  if (role === "failing") return `${GATE_SIGNS[gate]} ${GATES[gate] ?? "failing"}`;
  return role === "witness" ? "★ witness" : ROLES[role];
}

/** @param {Filter} filter whether it asks for calls */
function asksForCalls({ tool, gate, role }) {
  return Boolean(tool || gate || role);
}

/**
 * The trajectories of a group that match, none where the group does not.
 * @param {Group} group
 * @param {Filter} filter
 */
function matching(group, filter) {
  if (filter.step && String(group.step) !== filter.step) return [];
  const { search, success, grounding } = filter;
  const byCall = asksForCalls(filter);
  const inPrompt = search?.test(group.prompt) || search?.test(plain(group.ground_truth));
  return group.trajectories.filter(
    ({ success: right, grounded = null, calls, text }) =>
      (!success || right === (success === "yes")) &&
      (!grounding || String(grounded) === grounding) &&
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
    this.filter = { search: null, step: "", tool: "", gate: "", role: "", success: "", grounding: "" };
    /** Positions of the groups that match, the most interesting first. @type {number[]} */
    this.listed = [];
    this.page = 0;
    /** @type {Place | null} */
    this.place = null;
    /** How much of the open group is drawn; `calls` of each rollout, besides those folded away. */
    this.drawn = { rollouts: ROLLOUTS_AT_ONCE, calls: CALLS_AT_ONCE };
    /** The open group's trajectories in the order in which they stand. @type {number[]} */
    this.order = [];
    /** Those of them that match the filters. @type {Set<number>} */
    this.matched = new Set();
    /** Those that hold a witness of a call that matches, or the call nearest to it. @type {Set<number>} */
    this.companions = new Set();
    /** Where calls are asked for, those that are not folded away; null: all are open. @type {Set<string> | null} */
    this.unfolded = null;
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
          html("span", {}, `Step ${count(group.step)} · ${right} of ${group.trajectories.length} right`),
          html("span", {}, failing ? `${count(corrected)} of ${counted(failing, "failing call")} corrected` : "no failing calls"),
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
    const id = linkTo(place).slice(1);
    const isOpen = this.place?.group === place.group;
    if (!isOpen) {
      this.drawn = { rollouts: ROLLOUTS_AT_ONCE, calls: CALLS_AT_ONCE };
      this.arrange(group, place.group);
    }
    const witness = trajectory === null || call === null ? null : group.trajectories[trajectory]?.calls[call]?.witness;
    if (call !== null) this.unfolded?.add(id);
    if (witness) this.unfolded?.add(linkTo({ group: place.group, ...witness }).slice(1));
    const { rollouts, calls } = this.drawn;
    const rank = trajectory === null ? 0 : this.order.indexOf(trajectory);
    this.drawn = { rollouts: Math.max(rollouts, rank + 1), calls: Math.max(calls, (call ?? 0) + 1) };
    this.place = place;
    if (!isOpen || !byId(id)) this.render();
    const position = this.listed.indexOf(place.group);
    if (position >= 0) this.showPage(Math.floor(position / GROUPS_PER_PAGE));
    const current = document.querySelector("#group-list [aria-current]");
    if (current instanceof HTMLElement && current.parentElement) {
      const list = byId("group-list");
      const top = current.parentElement.offsetTop - list.offsetTop;
      if (top < list.scrollTop || top + current.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - 40;
    }

    for (const marked of box.querySelectorAll(".selected, .its-witness, .its-nearest")) {
      marked.classList.remove("selected", "its-witness", "its-nearest");
      marked.removeAttribute("aria-current");
    }
    let target = byId(linkTo({ ...place, call: null }).slice(1)) ?? box.querySelector("h3");
    const card = call === null ? null : byId(id);
    if (card && trajectory !== null && call !== null) {
      card.classList.add("selected");
      card.setAttribute("aria-current", "true");
      target = card;
      const kind = group.trajectories[trajectory].calls[call].matched ? "its-witness" : "its-nearest";
      if (witness) byId(linkTo({ group: place.group, ...witness }).slice(1))?.classList.add(kind);
    }
    if (focus && target instanceof HTMLElement) {
      target.focus({ preventScroll: true });
      target.scrollIntoView({ block: trajectory === null ? "start" : "nearest", inline: "nearest" });
    }
  }

  /** Opens the group again that was open, or else the first of the list: what is highlighted has changed. */
  reopen() {
    const { place } = this;
    this.place = null;
    byId("group").replaceChildren();
    const group = place && this.listed.includes(place.group) ? place.group : this.listed[0];
    if (group === undefined) return;
    const call = place?.group === group && this.groups[group].trajectories[place.trajectory ?? -1]?.calls[place.call ?? -1];
    this.open(place && call && callMatches(call, this.filter) ? place : { group, trajectory: null, call: null }, false);
  }

  /**
   * Orders the siblings. With filters set those that match come first, each with the rollouts that hold its calls'
   * witnesses at its side, so that the two can be compared.
   * @param {Group} group
   * @param {number} index
   */
  arrange(group, index) {
    const all = group.trajectories;
    const byCall = asksForCalls(this.filter);
    const found = new Set(matching(group, this.filter));
    this.matched = new Set([...all.keys()].filter((t) => found.has(all[t])));
    this.companions = new Set();
    this.unfolded = byCall ? new Set() : null;
    /** @type {Set<number>} */
    const order = new Set();
    for (const t of this.matched) {
      order.add(t);
      all[t].calls.forEach((call, c) => {
        if (!byCall || !callMatches(call, this.filter)) return;
        this.unfolded?.add(linkTo({ group: index, trajectory: t, call: c }).slice(1));
        if (!call.witness) return;
        this.unfolded?.add(linkTo({ group: index, ...call.witness }).slice(1));
        order.add(call.witness.trajectory);
        this.companions.add(call.witness.trajectory);
      });
    }
    this.order = [...new Set([...order, ...all.keys()])];
  }

  /** Draws the open group. */
  render() {
    const index = /** @type {Place} */ (this.place).group;
    const group = this.groups[index];
    this.speaksFor.clear();
    group.trajectories.forEach(({ calls }, trajectory) =>
      calls.forEach((given, call) => {
        if (!given.witness || !given.matched) return;
        const key = linkTo({ group: index, ...given.witness });
        if (!this.speaksFor.has(key)) this.speaksFor.set(key, []);
        this.speaksFor.get(key)?.push({ group: index, trajectory, call });
      }),
    );
    const asked = question(group.prompt);
    const right = group.trajectories.filter(({ success }) => success).length;
    const box = byId("group");
    const parts = present([
      html("h3", { id: `g${index}`, tabindex: -1, dir: "auto" }, shown(cut(asked, 300), this.filter.search)),
      html(
        "p",
        { class: "facts" },
        `Training step ${count(group.step)} · ${right} of ${counted(group.trajectories.length, "rollout")} right · group ${index + 1} `,
        html("span", { class: "uid" }, shown(cut(group.uid, 200))),
      ),
      this.onlySuccess(group) && html("p", { class: "facts" }, "Only one success in this group: nothing tells whether it is luck."),
      this.expected(group.ground_truth),
      folded("Whole prompt", () => longText(group.prompt, { limit: 4000, search: this.filter.search, label: "prompt" })),
      this.rolloutsOf(group, index),
    ]);
    box.replaceChildren(...parts);
  }

  /**
   * Whether one success is all that a group has. Its lift is never below 0 then, whatever the success is worth.
   * @param {Group} group
   */
  onlySuccess({ trajectories }) {
    return this.settings.scope !== "batch" && trajectories.filter(({ success }) => success).length === 1;
  }

  /** @param {unknown} truth */
  expected(truth) {
    const answers = truth === null ? [] : accepted(truth);
    if (!answers.length) return null;
    const named = answers.slice(0, MOST_ACCEPTED).map((answer) => html("b", { dir: "auto" }, shown(cut(answer, 300), this.filter.search)));
    const more = answers.length - named.length;
    return html("p", { class: "facts" }, "Expected: ", ...named.flatMap((answer, k) => (k ? [" or ", answer] : [answer])), more > 0 && ` or one of ${count(more)} more`);
  }

  /**
   * The siblings side by side, the first of them at once.
   * @param {Group} group
   * @param {number} index
   */
  rolloutsOf(group, index) {
    const row = html("div", { class: "siblings", tabindex: 0, role: "region", "aria-label": "Rollouts of this prompt, side by side" });
    const drawn = this.order.slice(0, this.drawn.rollouts);
    row.append(...drawn.map((t) => this.rollout(group.trajectories[t], index, t)));
    const left = this.order.length - drawn.length;
    return html("div", {}, row, left > 0 && this.more(counted(left, "rollout"), { group: index, trajectory: this.order[drawn.length], call: null }));
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
   */
  rollout(trajectory, group, t) {
    const { text, calls, success, grounded = null } = trajectory;
    const answer = answersFor(calls.map(({ found }) => found));
    const [isMatch, companion] = [this.matched.has(t), this.companions.has(t)];
    const { search } = this.filter;
    const id = `g${group}t${t}`;
    const body = html("div", { class: "turns" });
    const position = characterPositions(text);
    const isOpen = (/** @type {number} */ c) => !this.unfolded || this.unfolded.has(linkTo({ group, trajectory: t, call: c }).slice(1));
    let drawn = 0;
    for (let open = 0; drawn < calls.length && open < this.drawn.calls; drawn++) open += Number(isOpen(drawn));
    const row = this.row(body);
    let at = 0;
    for (const turn of this.turns(calls.slice(0, drawn))) {
      const [start, end] = (turn[0].call.span ?? [0, 0]).map(position);
      const between = text.slice(at, start);
      const where = { group, t, start: Math.max(start, at), end, position };
      const draw = (/** @type {boolean} */ whole) => [between ? this.between(between, answer) : null, this.turn(trajectory, turn, { ...where, isOpen: whole ? () => true : isOpen })];
      if (turn.some(({ c }) => isOpen(c))) row.add(...draw(false));
      else row.fold({ calls: turn, said: between + text.slice(where.start, end), draw: () => draw(true) });
      at = Math.max(at, end);
    }
    row.add();
    const left = calls.length - drawn;
    if (left > 0) body.append(this.more(counted(left, "call"), { group, trajectory: t, call: drawn }));
    const rest = text.slice(at);
    const spoken = at ? rest.lastIndexOf("assistant\n") : -1;
    const last = spoken < 0 ? rest : rest.slice(spoken + "assistant\n".length);
    if (spoken > 0) body.append(this.between(rest.slice(0, spoken), answer));
    if (last.trim()) {
      const block = html("section", { class: "turn" }, html("h5", {}, "Last turn"), advantage(trajectory.advantage, trajectory.advantage));
      block.append(longText(last.trim(), { search, label: "last turn" }));
      body.append(tint(block, trajectory.advantage, trajectory.advantage));
    }
    return html(
      "article",
      { class: isMatch || companion ? "rollout" : "rollout beside", "aria-labelledby": id },
      html(
        "header",
        {},
        html("h4", { id, tabindex: -1 }, `Rollout ${t + 1}`, html("span", { class: success ? "verdict right" : "verdict wrong" }, success ? "✓ right" : "✗ wrong")),
        html("p", { class: "facts" }, `score ${decimal(trajectory.score)} · `, advantage(trajectory.advantage, trajectory.advantage), !isMatch && companion && " · to compare"),
        grounded !== null && html("p", { class: "facts" }, grounded ? "grounded: a tool found the answer" : "ungrounded: no tool’s answer held the answer"),
        !isMatch && !companion && html("p", { class: "facts" }, "does not match the filters"),
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
   * @param {RegExp | null} answer
   */
  between(text, answer) {
    const hit = (answer?.test(text) ? ", the answer" : "") + (this.filter.search?.test(text) ? ", a match" : "");
    const part = folded(`Text between, ${counted(text.length, "character")}${hit}`, () =>
      longText(text, { search: this.filter.search, answer, label: "text between turns" }),
    );
    part.classList.add("between");
    return part;
  }

  /**
   * Fills a box from top to bottom; what does not match the filters is folded away, in a few parts.
   * @param {HTMLElement} box
   */
  row(box) {
    /** @type {Folded[]} */
    let passed = [];
    const close = () => {
      if (passed.length) box.append(this.passed(passed));
      passed = [];
    };
    return {
      /** @param {Child[]} parts */
      add: (...parts) => {
        close();
        box.append(...present(parts));
      },
      /** @param {Folded} part */
      fold: (part) => {
        if (passed.reduce((sum, { calls }) => sum + calls.length, 0) >= CALLS_AT_ONCE) close();
        passed.push(part);
      },
    };
  }

  /**
   * Calls that do not match the filters, with what is said around them.
   * @param {Folded[]} parts
   */
  passed(parts) {
    const { search } = this.filter;
    const calls = parts.flatMap((part) => part.calls);
    const [first, last] = [calls[0].c + 1, calls[calls.length - 1].c + 1];
    const names = calls.slice(0, 3).map(({ call }) => `${cut(spelled(call.tool), 40)} ${stateOf(call)}`);
    const more = calls.length > 3 ? ` and ${count(calls.length - 3)} more` : "";
    const hit = search && (parts.some(({ said }) => search.test(said)) || calls.some(({ call }) => callHas(call, search)));
    const summary = `${first === last ? `Call ${first}` : `Calls ${first} to ${last}`}: ${names.join(", ")}${more}${hit ? ", a match" : ""}`;
    const part = folded(summary, () => html("div", { class: "turns" }, ...parts.flatMap(({ draw }) => draw())));
    part.classList.add("between");
    return part;
  }

  /**
   * A turn with calls: what the model wrote, with a card in place of each call.
   * @param {Trajectory} trajectory
   * @param {{ call: Call, c: number }[]} calls
   * @param {{ group: number, t: number, start: number, end: number, position: (position: number) => number, isOpen: (c: number) => boolean }} where
   */
  turn(trajectory, calls, { group, t, start, end, position, isOpen }) {
    const { before, after } = calls[0].call;
    const block = html("div", { class: "turn" });
    const row = this.row(block);
    let at = start;
    /** @param {number} until */
    const prose = (until) => {
      const said = trajectory.text.slice(at, until).replace(/^\s*<\/tool_call>|<tool_call>\s*$/g, "").trim();
      if (said) row.add(longText(said, { search: this.filter.search, label: "turn" }));
      at = Math.max(at, until);
    };
    for (const { call, c } of calls) {
      const [from, to] = (call.call_span ?? [at, at]).map(position);
      prose(from);
      const said = trajectory.text.slice(from, to);
      const draw = () => [this.card(call, { group, trajectory: t, call: c }, said)];
      if (isOpen(c)) row.add(...draw());
      else row.fold({ calls: [{ call, c }], said, draw });
      at = Math.max(at, to);
    }
    row.add();
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
        html("span", { class: "badge" }, stateOf(call)),
        call.lucky && html("span", { class: "badge broken" }, "⚠ lucky witness"),
        call.seen && html("span", { class: "badge held" }, "✓ found the answer"),
        call.inexact && html("span", { class: "badge" }, "≈ only similar"),
        !call.ok && html("span", { class: "badge broken" }, "✗ ", spelled(cut(call.status, 80).replaceAll("_", " "))),
        advantage(call.before, call.after),
      ),
      this.parameters(given),
      given.length > MOST_ARGUMENTS && html("p", { class: "why" }, `and ${count(given.length - MOST_ARGUMENTS)} more arguments`),
      html("p", { class: "why" }, this.why(call)),
      this.figures(call, place),
      this.witnessOf(call, place),
      this.heardBy(place),
      call.result !== null && call.result !== "" && html("div", { class: "result" }, html("h6", {}, "Result"), longText(call.result, { limit: 220, search, answer: answersFor([call.found]), label: "result" })),
      raw !== "" && folded("As written", () => longText(raw, { search, label: "call" })),
    );
    return tint(card, call.before, call.after);
  }

  /** @param {[string, unknown][]} given */
  parameters(given) {
    const { search } = this.filter;
    return html(
      "dl",
      { class: "arguments" },
      ...given.slice(0, MOST_ARGUMENTS).map(([name, value]) =>
        html("div", {}, html("dt", {}, shown(cut(name, 80), search)), html("dd", {}, longText(plain(value), { limit: 300, search, label: "argument" }))),
      ),
    );
  }

  /**
   * Why a call was corrected or was not.
   * @param {Call} call
   */
  why({ role, gate, similarity, alpha, before, after, ok, inexact }) {
    const { theta, alpha_min } = this.settings;
    if (role === "witness") return "In a rollout that succeeded with a positive advantage: it can speak for its like.";
    if (role === "none") return ok ? "No part in the rule: its tool or its rollout does not count." : "Calls that did not run give and receive no credit.";
    const made = inexact ? "A successful sibling made a similar call" : "A successful sibling made this call too";
    if (gate === "corrected") {
      if (before === after) return `${made}; its tokens stay as they are, since another call of the same turn got no credit.`;
      return `${made}: ${after < 0 ? percent((before - after) / before) : "all"} of the blame is taken back.`;
    }
    if (gate === "below_alpha") return `${made}, but confidence ${decimal(alpha)} is below alpha_min ${alpha_min}: too few successes hold it.`;
    if (gate === "below_theta") return `The nearest call of a success has similarity ${decimal(similarity)}, below theta ${theta}.`;
    return "No successful sibling used this tool.";
  }

  /**
   * What the rule found for a call that matches a witness.
   * @param {Call} call
   * @param {Place} place
   */
  figures(call, { group }) {
    if (!call.matched) return null;
    const { similarity, support, alpha, lift, reference_advantage, transfer } = call;
    const single = this.onlySuccess(this.groups[group]);
    /** @type {[string, string | null][]} */
    const figures = [
      ["similarity", decimal(similarity)],
      ["support", decimal(support)],
      ["alpha", decimal(alpha)],
      ["lift", single ? "only one success in this group" : isNumber(lift) ? points(lift) : null],
      ["reference advantage", signed(reference_advantage)],
      ["transfer", call.gate === "corrected" ? signed(transfer) : null],
    ];
    return html("dl", { class: "figures" }, ...figures.map(([name, value]) => value !== null && html("div", {}, html("dt", {}, name), html("dd", {}, value))));
  }

  /**
   * A link to a call's witness, or to the nearest call, and the parameters in which the two differ.
   * @param {Call} call
   * @param {Place} place
   */
  witnessOf(call, { group }) {
    const { witness } = call;
    if (!witness) return call.matched && html("p", { class: "why" }, "Its witness is of another prompt.");
    const other = this.groups[group].trajectories[witness.trajectory].calls[witness.call].arguments;
    const name = call.matched ? "★ Its witness" : "≠ Nearest call";
    const differing = Object.entries(other).filter(([key, value]) => plain(value) !== plain(call.arguments[key]));
    return html(
      "div",
      { class: "witness-link" },
      html("a", { href: linkTo({ group, ...witness }) }, `${name}: ${this.nameOf(witness)}`),
      differing.length > 0 && this.parameters(differing),
    );
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
    const { trajectories } = this.groups[index];
    const all = this.order.flatMap((t, rank) => trajectories[t].calls.map((call, c) => ({ t, rank, call, c })));
    const wanted = all.filter(({ t, call }) => this.matched.has(t) && callMatches(call, this.filter));
    const calls = wanted.length ? wanted : all;
    const { trajectory, call } = this.place;
    const here = trajectory === null ? [-1, 0] : [this.order.indexOf(trajectory), call ?? -0.5];
    /** @type {(one: { rank: number, c: number }) => number} */
    const from = ({ rank, c }) => rank - here[0] || c - here[1];
    const next = direction > 0 ? calls.find((one) => from(one) > 0) : calls.reverse().find((one) => from(one) < 0);
    if (next) this.go({ group: index, trajectory: next.t, call: next.c });
  }

  /** From the selected call to its witness. */
  moveToWitness() {
    if (!this.place || this.place.trajectory === null || this.place.call === null) return;
    const witness = this.groups[this.place.group].trajectories[this.place.trajectory]?.calls[this.place.call]?.witness;
    if (witness) this.go({ group: this.place.group, ...witness });
  }
}

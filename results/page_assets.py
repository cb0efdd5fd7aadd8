"""The style and the script of index.html."""

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1b1b; --quiet: #5c5c5c; --line: #ddd;
  --head: #f2f3f5; --link: #0b57b0; --good: #d9f2df; --bad: #fadcd9; --even: #e9ebee }
@media (prefers-color-scheme: dark) { :root { --page: #16181b; --ink: #e6e6e6; --quiet: #a9adb3;
  --line: #3a3d42; --head: #23262a; --link: #7db4ff; --good: #1d4a2a; --bad: #5c2723;
  --even: #33373d } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 1.5rem auto 3rem; max-width: 1400px;
  padding: 0 1rem; color: var(--ink); background: var(--page) }
h1 { font-size: 1.6rem; margin: 0 0 .8rem } h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem }
a { color: var(--link) } p, #short li, figcaption, footer { max-width: 62rem }
#short { background: var(--head); border-radius: 8px; padding: .8rem 1.1rem }
#short h2 { margin: 0 } #short ul { margin: .4rem 0 0; padding-left: 1.2rem }
#short li { margin: .3rem 0 }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .9rem 0 }
.bar { display: flex; gap: .6rem; flex-wrap: wrap; align-items: center; margin: .6rem 0 }
input, select, .bar button { font: inherit; padding: .25rem .5rem; border: 1px solid #8a8f96;
  border-radius: 4px; background: var(--page); color: inherit; max-width: 15rem }
.bar button { cursor: pointer; max-width: none } .bar label { white-space: nowrap }
.bar .every { background: var(--link); color: var(--page); border-color: var(--link) }
.bar .columns[aria-pressed=true] { background: var(--even) }
.count { color: var(--quiet) }
.scroll { overflow: auto } .data .scroll { max-height: 85vh; border-bottom: 1px solid var(--line) }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: .88rem }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word }
thead th { position: sticky; top: 0; z-index: 2; background: var(--head) }
.data td:first-child { position: sticky; left: 0; z-index: 1; background: var(--page) }
.data thead th:first-child { left: 0; z-index: 3 }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid var(--link) }
th[aria-sort=ascending] button::after { content: " ↑" }
th[aria-sort=descending] button::after { content: " ↓" }
.data th { white-space: nowrap }
tr.empty td { color: var(--quiet) }
.claims thead th:first-child { width: 36% } tbody th { font-weight: 600 }
details { font-weight: 400; color: var(--quiet); font-size: .85rem }
summary { cursor: pointer; width: fit-content }
.claims small { color: var(--quiet); display: block }
.verdict { display: inline-block; border-radius: 4px; padding: 0 .45rem; font-weight: 600;
  white-space: nowrap; background: var(--even) }
.verdict.holds { background: var(--good) } .verdict.does-not-hold { background: var(--bad) }
.notes { color: var(--quiet); font-size: .88rem; columns: 2 24rem; margin-top: .7rem }
.notes li:target { background: var(--even) }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; height: auto; background: #fff;
  border: 1px solid var(--line) }
figcaption { color: var(--quiet); font-size: .92rem } footer { margin-top: 2.5rem;
  color: var(--quiet); font-size: .88rem }
code { font-size: .88em; background: var(--head); overflow-wrap: anywhere }
@media (min-width: 801px) { .data td:first-child { min-width: 8rem } }
@media (max-width: 800px) {
  section:not(.every-column) td[data-brief]::after { content: attr(data-brief); display: block;
    color: var(--quiet); font-size: .85em }
  body { margin-top: 1rem; padding: 0 .75rem } .bar .every { width: 100% }
  .bar label { display: grid; grid-template-columns: 6.5rem 1fr; width: 100%;
    align-items: center } .bar input, .bar select { max-width: none; min-width: 0 }
  section.data:not(.every-column) td:nth-child(n) { white-space: normal !important }
  .claims, .claims tbody, .claims tr, .claims td, .claims tbody th { display: block }
  .claims thead { display: none } .claims tr { border-bottom: 1px solid var(--line);
    padding: .3rem 0 } .claims td, .claims tbody th { border: 0; padding: .15rem .2rem }
  .claims td::before { content: attr(data-label) ": "; color: var(--quiet) }
}
"""

SCRIPT = """
'use strict';
for (const section of document.querySelectorAll('section.data')) {
  const body = section.querySelector('tbody'), rows = [...body.rows];
  const search = section.querySelector('input'), picks = [...section.querySelectorAll('select')];
  const count = section.querySelector('.count'), every = section.querySelector('.every');
  const pressed = button => button !== null && button.getAttribute('aria-pressed') === 'true';
  const listed = row => pressed(every) || !row.classList.contains('other');
  const value = (row, pick) => row.cells[+pick.dataset.column].textContent;
  const shown = row => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const text = row.textContent.toLowerCase();
    return listed(row) && words.every(word => text.includes(word)) &&
      picks.every(pick => !pick.value || value(row, pick) === pick.value);
  };
  const filter = () => {
    let left = 0;
    for (const row of rows) { row.hidden = !shown(row); left += !row.hidden; }
    count.textContent = left + ' of ' + rows.length + ' rows';
  };
  const offer = () => {  // of each filter, the values that the listed rows have
    for (const pick of picks) {
      const values = new Set(rows.filter(listed).map(row => value(row, pick)));
      for (const option of pick.options)
        option.hidden = option.index > 0 && !values.has(option.value);
      if (pick.selectedOptions[0].hidden) pick.value = '';
    }
    filter();
  };
  search.addEventListener('input', filter);
  picks.forEach(pick => pick.addEventListener('change', filter));
  const words = every && every.textContent;
  if (every) every.addEventListener('click', () => {
    every.setAttribute('aria-pressed', !pressed(every));
    every.textContent = pressed(every) ? 'Only methods with a recipe here' : words;
    offer();
  });
  const columns = section.querySelector('.columns');
  columns.addEventListener('click', () => {
    columns.setAttribute('aria-pressed', !pressed(columns));
    section.classList.toggle('every-column', pressed(columns));
  });
  section.querySelectorAll('th button').forEach((button, column) => {
    button.addEventListener('click', () => {
      const head = button.closest('th'), up = head.getAttribute('aria-sort') !== 'ascending';
      section.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const numeric = rows.every(row => key(row) === '' || !isNaN(parseFloat(key(row))));
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (x === '' || y === '') return (x === '') - (y === '');  // empty cells stay last
        const by = numeric ? parseFloat(x) - parseFloat(y) : x.localeCompare(y);
        return up ? by : -by;
      };
      body.append(...[...rows].sort(order));
    });
  });
  offer();
}
"""

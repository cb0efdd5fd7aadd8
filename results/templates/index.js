'use strict';
for (const section of document.querySelectorAll('section.data')) {
  const body = section.querySelector('tbody'), rows = [...body.rows];
  const search = section.querySelector('input'), picks = [...section.querySelectorAll('select')];
  const count = section.querySelector('.count'), every = section.querySelector('.every');
  const pressed = button => button !== null && button.getAttribute('aria-pressed') === 'true';
  const listed = row => pressed(every) || !row.classList.contains('other');
  const value = (row, pick) => row.cells[+pick.dataset.column].textContent;
  const shown = row => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
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

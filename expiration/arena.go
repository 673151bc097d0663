package expiration

import "iter"

// chunk is how many values are allocated at once. What grows by doubling has more than it needs most of the time.
const chunk = 1 << 12

// arena has values in numbered places that do not move. They have no pointers, and the garbage collector does not look at
// them.
type arena[T any] struct {
	chunks []*[chunk]T
	free   []slot
	last   slot // the greatest that was ever taken
}

func newArena[T any]() arena[T] { return arena[T]{} }

// at returns the value in a place that was taken, and given back or not.
func (a *arena[T]) at(s slot) *T { return &a.chunks[s/chunk][s%chunk] }

// take returns a place that is free. Slot 0 is none.
func (a *arena[T]) take() slot {
	if n := len(a.free); n > 0 {
		s := a.free[n-1]
		a.free = a.free[:n-1]
		return s
	}
	a.last++
	if int(a.last)/chunk >= len(a.chunks) {
		a.chunks = append(a.chunks, new([chunk]T))
	}
	return a.last
}

func (a *arena[T]) giveBack(s slot) { a.free = append(a.free, s) }

// all returns all places that were ever taken.
func (a *arena[T]) all() iter.Seq2[slot, *T] {
	return func(yield func(slot, *T) bool) {
		for s := slot(1); s <= a.last; s++ {
			if !yield(s, a.at(s)) {
				return
			}
		}
	}
}

// table finds slots by a key of 64 bits that is as good as random. It is a hash table with open addressing: the keys stand
// where the slots point to, so that an entry costs four bytes and not the forty of a map.
type table struct {
	key     func(slot) uint64
	entries []entry // of a length that is a power of two
	used    int
}

// entry is a slot, and some bits of its key beside it, so that a search need not look at what it passes. 0 is free.
type entry uint32

const (
	tagBits = 6
	// maxTimers is how many slots an entry can tell apart.
	maxTimers = 1<<(32-tagBits) - 1
)

func newEntry(key uint64, s slot) entry { return entry(s)<<tagBits | entry(key>>(64-tagBits)) }

func (e entry) slot() slot { return slot(e >> tagBits) }

func newTable(key func(slot) uint64) table {
	return table{key: key, entries: make([]entry, 16)}
}

// home is where the search for a key begins.
func (t *table) home(key uint64) int { return int(key & uint64(len(t.entries)-1)) }

// next is where it goes on.
func (t *table) next(i int) int { return (i + 1) & (len(t.entries) - 1) }

// find returns where a key stands, or the free place where it would stand.
func (t *table) find(key uint64) int {
	i, tag := t.home(key), newEntry(key, 0)
	for e := t.entries[i]; e != 0; e = t.entries[i] {
		if e&(1<<tagBits-1) == tag && t.key(e.slot()) == key {
			break
		}
		i = t.next(i)
	}
	return i
}

// get returns the slot of a key, or 0.
func (t *table) get(key uint64) slot { return t.entries[t.find(key)].slot() }

// set sets the slot of a key, which the slot's value has already.
func (t *table) set(key uint64, s slot) {
	i := t.find(key)
	if t.entries[i] == 0 {
		t.used++
	}
	t.entries[i] = newEntry(key, s)
	if t.used*4 > len(t.entries)*3 {
		t.grow()
	}
}

func (t *table) grow() {
	before := t.entries
	t.entries = make([]entry, 2*len(before))
	for _, e := range before {
		if e == 0 {
			continue
		}
		i := t.home(t.key(e.slot()))
		for t.entries[i] != 0 {
			i = t.next(i)
		}
		t.entries[i] = e
	}
}

// remove takes a key out, if it has this slot. What stands behind it moves up, so that every search still ends at the first
// free place.
func (t *table) remove(key uint64, s slot) {
	i := t.find(key)
	if t.entries[i].slot() != s {
		return
	}
	t.used--
	mask := len(t.entries) - 1
	for j := t.next(i); t.entries[j] != 0; j = t.next(j) {
		// It may move to i if its search passes there.
		if home := t.home(t.key(t.entries[j].slot())); (j-home)&mask >= (j-i)&mask {
			t.entries[i] = t.entries[j]
			i = j
		}
	}
	t.entries[i] = 0
}

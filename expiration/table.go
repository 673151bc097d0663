package expiration

// table finds slots by a key of 64 bits that is as good as random. It is a hash table with open addressing: the keys stand
// where the slots point to, so that an entry costs four bytes and not the forty of a map.
type table struct {
	key     func(slot) uint64
	region  *region[entry]
	entries []entry // the region's, of a length that is a power of two
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
	t := table{key: key}
	t.allocate(16)
	return t
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

// reserve makes room for n keys in a table that is empty.
func (t *table) reserve(n int) {
	size := len(t.entries)
	for n*4 > size*3 {
		size *= 2
	}
	t.region.release()
	t.allocate(size)
}

func (t *table) allocate(n int) {
	t.region = newRegion[entry](n)
	t.entries = t.region.values
}

func (t *table) grow() {
	before := t.region
	defer before.release()
	t.allocate(2 * len(before.values))
	for _, e := range before.values {
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

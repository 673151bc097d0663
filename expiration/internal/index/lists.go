package index

// links are the neighbours of a timer in a list.
type links struct{ next, previous *Timer }

// lists are lists of live timers, by the hash of what their timers have in common. The lists are linked through the timers themselves, so
// that a timer is removed without a search: an application service may have thousands in one list.
type lists struct {
	first map[uint64]*Timer
	// count is the length of each list. It is nil if nobody asks for it, because there can be a million lists of one timer.
	count map[uint64]int
	links func(*Timer) *links // which links of a timer these lists use
}

func newLists(links func(*Timer) *links) lists {
	return lists{first: map[uint64]*Timer{}, links: links}
}

func newCountedLists(links func(*Timer) *links) lists {
	l := newLists(links)
	l.count = map[uint64]int{}
	return l
}

func (l lists) add(key uint64, tm *Timer) {
	if first := l.first[key]; first != nil {
		l.links(tm).next = first
		l.links(first).previous = tm
	}
	l.first[key] = tm
	if l.count != nil {
		l.count[key]++
	}
}

func (l lists) remove(key uint64, tm *Timer) {
	its := l.links(tm)
	if its.next != nil {
		l.links(its.next).previous = its.previous
	}
	switch {
	case its.previous != nil:
		l.links(its.previous).next = its.next
	case its.next != nil:
		l.first[key] = its.next
	default:
		delete(l.first, key)
	}
	*its = links{}
	if l.count == nil {
		return
	}
	if l.count[key]--; l.count[key] == 0 {
		delete(l.count, key)
	}
}

// each calls f for each timer of a list. f may remove that timer.
func (l lists) each(key uint64, f func(*Timer)) {
	for tm := l.first[key]; tm != nil; {
		next := l.links(tm).next
		f(tm)
		tm = next
	}
}

package index

// links are the neighbours of a timer in a list.
type links struct{ next, previous *Timer }

// list is a list of live timers.
type list struct {
	first *Timer
	n     int32
}

// lists are lists by the hash of what their timers have in common. The lists are linked through the timers themselves, so that a timer is
// removed without a search: an application service may have thousands in one list.
type lists struct {
	of    map[uint64]list
	links func(*Timer) *links // which links of a timer these lists use
}

func newLists(links func(*Timer) *links) lists { return lists{map[uint64]list{}, links} }

func (l lists) add(key uint64, tm *Timer) {
	to := l.of[key]
	if to.first != nil {
		l.links(tm).next = to.first
		l.links(to.first).previous = tm
	}
	l.of[key] = list{tm, to.n + 1}
}

func (l lists) remove(key uint64, tm *Timer) {
	from, its := l.of[key], l.links(tm)
	if its.next != nil {
		l.links(its.next).previous = its.previous
	}
	if its.previous != nil {
		l.links(its.previous).next = its.next
	} else {
		from.first = its.next
	}
	*its = links{}
	if from.n--; from.n > 0 {
		l.of[key] = from
	} else {
		delete(l.of, key)
	}
}

// each calls f for each timer of a list. f may remove that timer.
func (l lists) each(key uint64, f func(*Timer)) {
	for tm := l.of[key].first; tm != nil; {
		next := l.links(tm).next
		f(tm)
		tm = next
	}
}

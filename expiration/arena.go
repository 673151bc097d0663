package expiration

import "iter"

// chunk is how many values are allocated at once. What grows by doubling has more than it needs most of the time.
const chunk = 1 << 14

// arena has values in numbered places that do not move. They have no pointers.
type arena[T any] struct {
	chunks []*region[T]
	free   []slot
	last   slot // the greatest that was ever taken
}

// at returns the value in a place that was taken, and given back or not.
func (a *arena[T]) at(s slot) *T { return &a.chunks[s/chunk].values[s%chunk] }

// take returns a place that is free. Slot 0 is none.
func (a *arena[T]) take() slot {
	if n := len(a.free); n > 0 {
		s := a.free[n-1]
		a.free = a.free[:n-1]
		return s
	}
	a.last++
	if int(a.last)/chunk >= len(a.chunks) {
		a.chunks = append(a.chunks, newRegion[T](chunk))
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

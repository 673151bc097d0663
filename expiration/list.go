package expiration

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// DelayedEvents yields the events that a user has scheduled, with those that are on their way into their rooms, in the order of their
// deadlines. The list begins after the place given, or at its start for "". Each row is read when its turn comes. The sequence ends with
// the first error.
func (t *Timers) DelayedEvents(ctx context.Context, owner, after string) iter.Seq2[DelayedEvent, error] {
	return func(yield func(DelayedEvent, error) bool) {
		for _, l := range t.listOf(owner, after) {
			row, _, err := t.load(ctx, l.timer)
			switch {
			case errors.Is(err, ErrNotFound):
				continue
			case err != nil:
				yield(DelayedEvent{}, err)
				return
			}
			if !yield(DelayedEvent{DelayID: t.tokens.Token(row.Event.ID), Timer: row, Place: l.place}, nil) {
				return
			}
		}
	}
}

// listed is one entry of the list.
type listed struct {
	timer *index.Timer
	place string
}

// listOf returns what a user has scheduled, sorted by place.
func (t *Timers) listOf(owner, after string) (list []listed) {
	sender := t.tokens.names.hash(owner)
	t.mu.Lock()
	t.index.DelayedOf(sender, func(tm *index.Timer) {
		// The token tells events with the same deadline apart.
		if place := fmt.Sprintf("%016x%x", tm.Deadline, tm.Token()); place > after {
			list = append(list, listed{tm, place})
		}
	})
	t.mu.Unlock()
	slices.SortFunc(list, func(a, b listed) int { return cmp.Compare(a.place, b.place) })
	return list
}

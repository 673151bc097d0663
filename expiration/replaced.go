package expiration

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// StateComes is called before a state event of this server is given to the roomserver. It writes down which timers it may replace: whether
// it did is found out behind the sender's answer, see StateSent, and if the process dies before, the next one has to find out before a
// token is used. If it fails, all is well as long as the process lives. It does not fail because the caller hangs up.
func (t *Timers) StateComes(ctx context.Context, s StateKey, eventID string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	for _, tm := range t.ofState(s, eventID) {
		if tm.Delayed() {
			continue
		}
		if err := t.doubt(ctx, tm); err != nil {
			t.metrics.errors.WithLabelValues("doubt").Inc()
			return fmt.Errorf("noting that an event may be replaced: %w", err)
		}
		failpoint.Pass(failpoint.AfterDoubt)
	}
	return nil
}

// doubt writes down that the event of a timer may be replaced. Under the row's lock: the row may be on its way.
func (t *Timers) doubt(ctx context.Context, tm *index.Timer) error {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = t.doubts.Do(ctx, tm.NID())
	return err
}

// StateSent is called when a state event that was sent here has come to the roomserver. It stops the delayed events that are overtaken,
// and sees to it that no token of an expiring event that was replaced is worth anything any more: whoever uses one looks first. The
// timer itself goes when the output stream tells of the change. To find out what the current state is, the roomserver goes through all
// state of the room, and the sender need not wait for that. If it fails, StateChanged must be called.
func (t *Timers) StateSent(ctx context.Context, s StateKey, eventID string) error {
	var delayed []*index.Timer
	for _, tm := range t.ofState(s, eventID) {
		if tm.Delayed() {
			delayed = append(delayed, tm)
		} else {
			t.supersede(tm)
		}
	}
	return t.dropReplaced(ctx, delayed)
}

// StateChanged stops the timers of a piece of state whose event was replaced. It is called when the output stream tells of a state
// event. If it fails, a timer may run on that must not: call it again.
func (t *Timers) StateChanged(ctx context.Context, s StateKey, eventID string) error {
	return t.dropReplaced(ctx, t.ofState(s, eventID))
}

// ofState returns the running timers of a piece of state, but for that of the event that is its current state now.
func (t *Timers) ofState(s StateKey, eventID string) (timers []*index.Timer) {
	state, itself := t.tokens.names.state(s), t.tokens.names.hash(eventID)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.OfState(state, func(tm *index.Timer) {
		if tm.Running() && tm.Event() != itself {
			timers = append(timers, tm)
		}
	})
	return timers
}

// StateRemoved does what StateChanged does for the timer of an event that is found to be no longer the current state.
func (t *Timers) StateRemoved(ctx context.Context, eventID string) error {
	tm := t.ofEvent(eventID)
	if tm == nil {
		return nil
	}
	return t.dropReplaced(ctx, []*index.Timer{tm})
}

// RoomChanged does what StateChanged does for all state of a room. It is called when the whole state was rewritten.
func (t *Timers) RoomChanged(ctx context.Context, roomID string) error {
	room := t.tokens.names.hash(roomID)
	t.mu.Lock()
	timers := slices.DeleteFunc(t.index.InRoom(room), func(tm *index.Timer) bool { return tm.State() == 0 })
	t.mu.Unlock()
	return t.dropReplaced(ctx, timers)
}

// dropReplaced stops those timers of state events that were replaced. At those that are left somebody looks again: the output
// stream can be faster than the roomserver's database. One that is claimed is left to whoever closes it: to ask about each
// event that its own closing event replaces would go through all state of the room.
func (t *Timers) dropReplaced(ctx context.Context, timers []*index.Timer) error {
	var failed []error
	for _, tm := range timers {
		if !t.isRunning(tm) {
			continue
		}
		row, _, err := t.load(ctx, tm)
		replaced := false
		if err == nil {
			replaced, err = t.roomserver.Replaced(ctx, row)
		}
		switch {
		case replaced:
			t.log.WithFields(logrus.Fields{"timer_nid": tm.NID(), "event_id": row.Event.ID}).Debug("An event was replaced")
			t.drop(ctx, tm, Replaced)
		case err != nil && !isFinal(err):
			t.metrics.errors.WithLabelValues("current_state").Inc()
			failed = append(failed, fmt.Errorf("looking up whether an event was replaced: %w", err))
		}
		t.lookAgain(tm)
	}
	return errors.Join(failed...)
}

// supersede makes somebody find out whether an event was replaced by state that was sent here. Until then the timer does not count for
// the limit.
func (t *Timers) supersede(tm *index.Timer) {
	t.mu.Lock()
	if tm.Running() {
		tm.Doubt(index.Superseded)
	}
	t.mu.Unlock()
	t.lookAgain(tm)
}

// lookAgain makes the scheduler find out once more whether an event was replaced. Until then a refresh does.
func (t *Timers) lookAgain(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !tm.Running() {
		return
	}
	tm.Doubt(index.MaybeReplaced)
	wake := t.clock.now() + lookAgainAfter
	if before, scheduled := tm.Wake(); !scheduled || wake < before {
		t.index.Schedule(tm, wake) // or activate does
		t.notify()
	}
}

// dropDoubtful stops a timer that lookAgain has been told of, if its event was replaced.
func (t *Timers) dropDoubtful(ctx context.Context, tm *index.Timer, row Timer) error {
	replaced, err := t.roomserver.Replaced(ctx, row)
	switch {
	case err != nil:
		return fmt.Errorf("looking up whether an event was replaced: %w", err)
	case replaced:
		t.drop(ctx, tm, Replaced)
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tm.Resolve(index.MaybeReplaced)
	return nil
}

func (t *Timers) isDoubtful(tm *index.Timer) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tm.Running() && tm.Has(index.MaybeReplaced)
}

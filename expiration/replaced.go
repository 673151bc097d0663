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

// StateComes is called before the roomserver gets a state event of this server. It marks in the database the timers that the event may
// replace, by removing their digests. After a crash the next process looks at those before it accepts their tokens; without a crash,
// StateSent does that. An error therefore does no harm while the process lives. StateComes goes on if the caller hangs up.
func (t *Timers) StateComes(ctx context.Context, s StateKey, eventID string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	for _, tm := range t.ofState(s, eventID) {
		if err := t.doubt(ctx, tm); err != nil {
			t.metrics.errors.WithLabelValues("doubt").Inc()
			return fmt.Errorf("noting that an event may be replaced: %w", err)
		}
		failpoint.Pass(failpoint.AfterDoubt)
	}
	return nil
}

// doubt removes the digest of a timer. It takes the row's lock, because the row may still be written.
func (t *Timers) doubt(ctx context.Context, tm *index.Timer) error {
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	_, err = t.doubts.Do(ctx, tm.NID())
	return err
}

// StateSent is called when the roomserver has a state event that was sent here. It marks the timers that the event replaced as Superseded.
// The next use of such a token checks the room's state first. The timer itself is dropped when the output stream reports the change, or by
// the scheduler after lookAgainAfter. StateSent does not check it, because the roomserver reads all state of the room for that, and the
// sender would wait.
func (t *Timers) StateSent(s StateKey, eventID string) {
	for _, tm := range t.ofState(s, eventID) {
		t.supersede(tm)
	}
}

// StateChanged stops the timers of a piece of state whose event was replaced. It is called when the output stream reports a state event.
// After an error, a timer of a replaced event may still run, and StateChanged must be called again.
func (t *Timers) StateChanged(ctx context.Context, s StateKey, eventID string) error {
	return t.dropReplaced(ctx, t.ofState(s, eventID))
}

// ofState returns the running timers of expiring events of a piece of state, except for that of its current event.
func (t *Timers) ofState(s StateKey, eventID string) (timers []*index.Timer) {
	state, itself := t.tokens.names.state(s), t.ofEvent(eventID)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.OfState(state, func(tm *index.Timer) {
		if tm.Running() && !tm.Delayed() && tm != itself {
			timers = append(timers, tm)
		}
	})
	return timers
}

// StateRemoved does what StateChanged does, for the timer of one event that is no longer the current state.
func (t *Timers) StateRemoved(ctx context.Context, eventID string) error {
	tm := t.ofEvent(eventID)
	if tm == nil {
		return nil
	}
	return t.dropReplaced(ctx, []*index.Timer{tm})
}

// RoomChanged does what StateChanged does, for all state of a room. It is called when the whole state was rewritten.
func (t *Timers) RoomChanged(ctx context.Context, roomID string) error {
	room := t.tokens.names.hash(roomID)
	t.mu.Lock()
	timers := slices.DeleteFunc(t.index.InRoom(room), func(tm *index.Timer) bool { return tm.State() == 0 || tm.Delayed() })
	t.mu.Unlock()
	return t.dropReplaced(ctx, timers)
}

// dropReplaced stops those timers of state events that were replaced. The others are checked again later, because the output stream can be
// faster than the roomserver's database. Claimed timers are left to their attempt: the check reads all state of the room, which is too
// expensive for every event that its own closing event replaces.
func (t *Timers) dropReplaced(ctx context.Context, timers []*index.Timer) error {
	var failed []error
	for _, tm := range timers {
		if !t.isRunning(tm) {
			continue
		}
		row, _, err := t.load(ctx, tm)
		replaced := false
		if err == nil {
			replaced, err = t.roomserver.Replaced(ctx, row.Event)
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

// supersede marks a timer whose event was probably replaced by state that was sent here. Until the check, the timer does not count against
// the sender's limit.
func (t *Timers) supersede(tm *index.Timer) {
	t.mu.Lock()
	if tm.Running() {
		tm.Doubt(index.Superseded)
	}
	t.mu.Unlock()
	t.lookAgain(tm)
}

// lookAgain marks a timer as MaybeReplaced, and makes the scheduler check it after lookAgainAfter. A refresh before that checks as well.
func (t *Timers) lookAgain(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !tm.Running() {
		return
	}
	tm.Doubt(index.MaybeReplaced)
	wake := t.clock.now() + lookAgainAfter
	if before, scheduled := tm.Wake(); !scheduled || wake < before {
		t.index.Schedule(tm, wake) // refused while Pending: activateWithMu schedules it then
		t.notify()
	}
}

// dropDoubtful checks a timer that lookAgain has marked, and stops it if its event was replaced.
func (t *Timers) dropDoubtful(ctx context.Context, tm *index.Timer, row Timer) error {
	t.mu.Lock()
	raised := tm.Raised()
	t.mu.Unlock()
	replaced, err := t.roomserver.Replaced(ctx, row.Event)
	switch {
	case err != nil:
		return fmt.Errorf("looking up whether an event was replaced: %w", err)
	case replaced:
		t.drop(ctx, tm, Replaced)
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm.Raised() == raised { // otherwise the answer is older than the doubt
		tm.Resolve(index.MaybeReplaced)
	}
	return nil
}

func (t *Timers) isDoubtful(tm *index.Timer) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tm.Running() && tm.Has(index.MaybeReplaced)
}

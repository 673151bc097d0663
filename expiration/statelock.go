package expiration

import (
	"context"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// LockState takes the lock of a piece of state, and returns the function that gives it back. The caller holds it while it builds an event
// for that state and gives it to the roomserver. LockState first finishes closing events that are claimed but not sent, so that they do not
// arrive after the caller's event.
//
// An event that the roomserver does not answer must not block other sends, so LockState waits little longer than sendPatience for it. After
// that the send goes on, even without the lock if an attempt holds it and has claimed its event. Then both events have the same prev
// events, and state resolution prefers the send, which bears the later time. There are two exceptions: another send is always waited for,
// and so is an attempt for a type that state resolution orders by power.
func (t *Timers) LockState(ctx context.Context, s StateKey) (unlock func(), err error) {
	state := t.tokens.names.state(s)
	for unlock == nil {
		switch unlock, err = t.lockSoon(ctx, state); {
		case err == nil:
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !orderedByPower(s.Type) && t.attemptHasClaimed(state):
			time.Sleep(2 * time.Millisecond) // so that the send bears a later time
			return func() {}, nil
		}
	}
	patient, cancel := context.WithTimeout(ctx, sendPatience)
	defer cancel()
	for _, tm := range t.halfClosed(state) {
		err = t.attempt(patient, tm, Expired, nil)
		t.removeRow(ctx, tm)
		if err != nil && !isFinal(err) {
			t.log.WithError(err).WithField("room_id", s.RoomID).Debug("A send does not wait for an unfinished closing event")
		}
	}
	return unlock, nil
}

// orderedByPower reports whether state resolution orders events of a type by their senders' power instead of by time.
func orderedByPower(eventType string) bool {
	switch eventType {
	case "m.room.power_levels", "m.room.join_rules", "m.room.member":
		return true
	}
	return false
}

// lockSoon takes the lock of a piece of state, but waits no longer than sendPatience.
func (t *Timers) lockSoon(ctx context.Context, state uint64) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, sendPatience)
	defer cancel()
	return t.states.Lock(ctx, state)
}

// attemptHasClaimed reports whether an attempt holds the lock of a piece of state and has claimed its event. An attempt that has not
// claimed yet may build its event after a send that passes it, and would overwrite that.
func (t *Timers) attemptHasClaimed(state uint64) (claimed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.heldStates[state]; !ok {
		return false
	}
	t.index.OfState(state, func(tm *index.Timer) { claimed = claimed || tm.Phase() == index.Claimed })
	return claimed
}

package expiration

import (
	"context"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// LockState waits for the lock of a piece of state and returns the function that gives it back. It is held while an
// event for that state is built and given to the roomserver. A closing event that an earlier fault left half done is
// finished first, so that it does not come behind what is sent now.
//
// Neither that nor an attempt that has the lock and has claimed is waited for much longer than sendPatience: an event that the roomserver
// does not answer must not keep others from sending. Without the lock both are built upon the same events, and state resolution prefers
// the send, which bears the later time. Where it goes by power first, an attempt is waited for until it ends, and another send always.
func (t *Timers) LockState(ctx context.Context, s StateKey) (unlock func(), err error) {
	state := t.tokens.names.state(s)
	for unlock == nil {
		switch unlock, err = t.lockSoon(ctx, state); {
		case err == nil:
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case !decidesWhoMay(s.Type) && t.attemptHasClaimed(state):
			time.Sleep(2 * time.Millisecond) // so that what is sent now bears a later time
			return func() {}, nil
		}
	}
	patient, cancel := context.WithTimeout(ctx, sendPatience)
	defer cancel()
	for _, tm := range t.halfClosed(state) {
		err = t.attempt(patient, tm, Expired, nil)
		t.removeRow(ctx, tm)
		if err != nil && !isFinal(err) {
			t.log.WithError(err).WithField("room_id", s.RoomID).Debug("A send goes past an event that is half done")
		}
	}
	return unlock, nil
}

// decidesWhoMay reports whether state resolution orders events of a type by the power of their senders, and not by time.
func decidesWhoMay(eventType string) bool {
	switch eventType {
	case "m.room.power_levels", "m.room.join_rules", "m.room.member":
		return true
	}
	return false
}

// lockSoon is the lock of a piece of state, unless it takes longer than sendPatience.
func (t *Timers) lockSoon(ctx context.Context, state uint64) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, sendPatience)
	defer cancel()
	return t.states.Lock(ctx, state)
}

// attemptHasClaimed reports whether an attempt has the lock of a piece of state, and has claimed its event. One that has not may build its event
// later than a send that goes past it, and overwrite what is sent.
func (t *Timers) attemptHasClaimed(state uint64) (claimed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.attempts[state]; !ok {
		return false
	}
	t.index.OfState(state, func(tm *index.Timer) { claimed = claimed || tm.Phase() == index.Claimed })
	return claimed
}

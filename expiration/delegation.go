package expiration

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// keptGrace is the least time for which a timer with a delegation runs after Start. The engine starts before the SFU is watched, and such a
// timer may have no other keep-alives. The grace is not longer than MSC4140 allows.
const keptGrace = maxDelayedGrace

// Kept names a timer by the hash of its token, because the token itself is not stored.
type Kept struct {
	Hash TokenHash // of the refresh token, or of the delay ID
	// Delayed says that the timer is that of a delayed event.
	Delayed bool
}

// Delegation is a timer that a participant's connection to the SFU keeps alive, in place of the client. A timer has one at most, which is
// deleted with the timer's row, whatever the reason.
type Delegation struct {
	// NID is the number of the timer's row.
	NID int64
	Kept
	// These are the timer's: its event's sender and room, and its duration.
	UserID, RoomID string
	Duration       time.Duration
	// MemberKey identifies the member whose leave event it is. Of the delegations of one member, the newest counts. It is zero if the timer
	// alone identifies the delegation.
	MemberKey [32]byte
	// Room and Identity name the participant at the SFU.
	Room, Identity string
	// Taken is when the delegation was accepted, and Seen when the SFU last said that the participant is there, or zero. Both have whole
	// milliseconds.
	Taken, Seen time.Time
	// RoomSID is the number of the SFU's room in which the participant was seen. A room that was made again has another one.
	RoomSID string
	Phase   DelegationPhase
}

// DelegationPhase is where a delegation is in its life.
type DelegationPhase string

const (
	// DelegationWaiting: the participant was not there yet.
	DelegationWaiting DelegationPhase = "waiting"
	// DelegationConnected: the participant was there.
	DelegationConnected DelegationPhase = "connected"
	// DelegationGone: the participant is gone, so the timer must end and must not be refreshed again.
	DelegationGone DelegationPhase = "gone"
)

// SessionNote is what changes in the delegation of a timer while the SFU is watched.
type SessionNote struct {
	NID     int64 // of the timer
	Seen    time.Time
	RoomSID string
	Phase   DelegationPhase
}

// Find returns what Delegate needs to know of a running timer: number, user, room and duration. An owner of "" matches every sender, a
// room of "" every room. The error is ErrNotFound if no such timer runs, and otherwise a passing fault.
func (t *Timers) Find(ctx context.Context, k Kept, owner, roomID string) (Delegation, error) {
	tm := t.find(k.Hash, k.Delayed)
	if tm == nil {
		return Delegation{}, ErrNotFound
	}
	if t.isDoubtful(tm) {
		if err := t.dropReplaced(ctx, []*index.Timer{tm}); err != nil {
			return Delegation{}, err
		}
	}
	row, _, err := t.load(ctx, tm)
	switch {
	case err != nil:
		return Delegation{}, err
	case row.Claim != nil, owner != "" && owner != row.Event.Sender, roomID != "" && roomID != row.Event.RoomID:
		return Delegation{}, ErrNotFound
	}
	return Delegation{NID: row.NID, Kept: k, UserID: row.Event.Sender, RoomID: row.Event.RoomID, Duration: row.Duration}, nil
}

// Delegate stores the delegation of the running timer that d.Kept names. It takes the place of an earlier one of the same timer, and of that
// of another timer with the same MemberKey. An empty phase means DelegationWaiting, and a zero Taken means now. NID, UserID, RoomID and
// Duration are the timer's, and ignored here.
//
// When it returns nil, the delegation is durable. The error is ErrNotFound if no such timer runs; then nothing is stored or replaced. After
// any other error the delegation may be stored or not.
func (t *Timers) Delegate(ctx context.Context, d Delegation) error {
	tm := t.find(d.Hash, d.Delayed)
	if tm == nil {
		return ErrNotFound
	}
	unlock, err := t.lockRow(ctx, tm)
	if err != nil {
		return err
	}
	defer unlock()
	if !t.isRunning(tm) {
		return ErrNotFound
	}
	d.NID, d.Phase = tm.NID(), cmp.Or(d.Phase, DelegationWaiting)
	if d.Taken.IsZero() {
		d.Taken = t.clock.stored(t.clock.now())
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), batch.Timeout)
	defer cancel()
	failpoint.Pass(failpoint.BeforeDelegation)
	running, err := t.store.Delegate(ctx, d)
	if err != nil {
		t.metrics.errors.WithLabelValues("delegate").Inc()
		return fmt.Errorf("storing a delegation: %w", err)
	}
	failpoint.Pass(failpoint.AfterDelegation)
	if !running { // a write to the row has returned an error, and was done all the same
		if _, _, err = t.loadUnderRow(ctx, tm); err != nil {
			return err
		}
		return ErrNotFound
	}
	return nil
}

// Delegations returns the delegations of the timers that run, in any order.
func (t *Timers) Delegations(ctx context.Context) ([]Delegation, error) {
	delegations, err := t.store.Delegations(ctx)
	if err != nil {
		return nil, fmt.Errorf("reading the delegations: %w", err)
	}
	return delegations, nil
}

// NoteSession changes delegations in one commit. A timer that has none any more is left out. After an error the changes may be stored or
// not.
func (t *Timers) NoteSession(ctx context.Context, notes []SessionNote) error {
	ctx, cancel := context.WithTimeout(ctx, batch.Timeout)
	defer cancel()
	failpoint.Pass(failpoint.BeforeSession)
	if err := t.store.NoteSessions(ctx, notes); err != nil {
		t.metrics.errors.WithLabelValues("note_session").Inc()
		return fmt.Errorf("storing what was seen of participants: %w", err)
	}
	return nil
}

// KeepAlive restarts a timer with its own duration. When it returns nil, the new deadline is durable. The error is ErrNotFound if no such
// timer runs, so that there is nothing to keep alive. After any other error the timer has either its old or its new deadline.
//
// It does not count as a request with the token: the client may go on refreshing as often as before.
func (t *Timers) KeepAlive(ctx context.Context, k Kept) error {
	tm := t.find(k.Hash, k.Delayed)
	if tm == nil {
		return ErrNotFound
	}
	return t.refresh(ctx, tm, 0)
}

// Supersede cancels the older of two delayed events of one sender if both are for the same state. Otherwise it does nothing, as for an event
// that is over or on its way. An older leave event that nobody keeps alive would throw out who has come back. The error is passing.
func (t *Timers) Supersede(ctx context.Context, older, newer Kept) error {
	before, after := t.find(older.Hash, older.Delayed), t.find(newer.Hash, newer.Delayed)
	if !before.Delayed() || !after.Delayed() || before == after || before.State() == 0 || before.State() != after.State() ||
		before.Sender() != after.Sender() {
		return nil
	}
	if err := t.cancel(ctx, before); err != nil && !isFinal(err) {
		return fmt.Errorf("cancelling an older delayed event: %w", err)
	}
	return nil
}

// Finish closes an expiring event, as End does, or sends a delayed event, as SendDelayed does, and returns their errors. When it returns nil,
// the room has the event. End answers only once that the sender is gone: if Finish gets that answer, a later End of the client gets
// ErrNotFound.
func (t *Timers) Finish(ctx context.Context, k Kept) error {
	if k.Delayed {
		return t.sendNow(ctx, k.Hash, "")
	}
	return t.End(ctx, k.Hash)
}

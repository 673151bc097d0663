package expiration

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// Pending is a timer whose event is on its way into the room.
type Pending struct {
	t       *Timers
	timer   *index.Timer
	existed bool // the timer is that of an equal event, which another request sent
}

// Begin stores the timer of an event that is about to be given to the roomserver. The deadline is the given duration, which must be
// positive, from now. The error is a *LimitError if the sender has reached the limit of running timers. service says that an application
// service sends the event; it has no limit.
//
// Two kinds of timers do not count: the one that the new event replaces and, up to unsentFactor times the limit, those whose event the
// roomserver failed to take or does not know. Most likely these never run.
func (t *Timers) Begin(ctx context.Context, e Event, duration time.Duration, service bool) (*Pending, error) {
	tm, existed, err := t.insert(ctx, Timer{Event: e, Duration: duration}, service)
	if err != nil {
		return nil, err
	}
	return &Pending{t: t, timer: tm, existed: existed}, nil
}

// insert adds a timer to the index and stores its row. The deadline counts from now, and the scheduler does not look at the timer yet.
// existed is true if the timer exists already: equal messages, built in the same millisecond upon the same prev events, are one event.
func (t *Timers) insert(ctx context.Context, row Timer, service bool) (tm *index.Timer, existed bool, err error) {
	now := t.clock.now()
	due := now + row.Duration
	row.TokenHash = HashToken(t.tokens.Token(row.Event.ID))
	row.Received, row.Deadline = t.clock.stored(now), t.clock.stored(due)
	digest := t.tokens.Digest(row)

	t.mu.Lock()
	for same := t.byTokenWithMu(row.TokenHash, row.Delayed != nil); same.Live(); same = t.byTokenWithMu(row.TokenHash, row.Delayed != nil) {
		t.mu.Unlock()
		// The row of the existing timer may still be written, and the write may fail. The caller relies on the row, so wait for it.
		unlock, err := t.lockRow(ctx, same)
		if err != nil {
			return nil, false, err
		}
		unlock()
		t.mu.Lock()
		if same.Live() {
			t.mu.Unlock()
			return same, true, nil
		}
	}
	if err = t.overLimitWithMu(digest.kind(), service, digest, now); err != nil {
		t.mu.Unlock()
		return nil, false, err
	}
	row.NID = t.index.NextNID()
	// From now on the timer can be found, and callers that find it wait for the row's lock until the write is decided. The number is new,
	// so nobody else holds its lock, and Lock does not block here.
	unlock, _ := t.rows.Lock(context.Background(), row.NID)
	defer unlock()
	tm = t.index.Add(newIndexed(row, digest).row(), due)
	t.mu.Unlock()
	if err = t.write(ctx, tm, row, digest); err != nil {
		return nil, false, err
	}
	return tm, false, nil
}

// write writes the row of a new timer under the row's lock, and stops the timer if the write fails.
func (t *Timers) write(ctx context.Context, tm *index.Timer, row Timer, d Digest) (err error) {
	written := false
	defer func() { // also after a panic
		if written {
			return
		}
		t.mu.Lock()
		t.index.Stop(tm)
		t.mu.Unlock()
		t.metrics.errors.WithLabelValues("insert").Inc()
		t.removeRowUnderRow(ctx, tm) // a failed write may still have reached the database
	}()
	failpoint.Pass(failpoint.BeforeInsert)
	if err = t.store.Insert(ctx, row, d); err != nil {
		return fmt.Errorf("storing the timer of %s: %w", row.Event.ID, err)
	}
	written = true
	failpoint.Pass(failpoint.AfterInsert)
	return nil
}

// overLimitWithMu returns a *LimitError if the sender may not have another timer of this kind. An application service may have any number of
// expiring events running for a user. What it schedules for the user has a limit of its own.
func (t *Timers) overLimitWithMu(kind index.Kind, service bool, d Digest, now time.Duration) error {
	sender := d.get(digestSender)
	switch {
	case kind == index.Delayed && t.index.Count(sender, kind) < t.cfg.MaxScheduledPerUser,
		kind == index.ServiceDelayed && t.index.Count(sender, kind) < t.cfg.MaxScheduledPerServiceUser,
		kind == index.Expiring && (service || t.mayRunWithMu(sender, d.get(digestState))):
		return nil
	}
	first := time.Duration(math.MaxInt64)
	t.index.OfSender(sender, kind, func(tm *index.Timer) {
		if wake, _ := tm.Wake(); !tm.Has(index.Superseded) {
			first = min(first, max(tm.Due, wake))
		}
	})
	return &LimitError{RetryAfter: max(first-now, 0) + usualAttempt}
}

// mayRunWithMu reports whether a sender may have another expiring event running, of a piece of state or, for 0, a message.
func (t *Timers) mayRunWithMu(sender, state uint64) bool {
	count, unsent := 0, 0
	t.index.OfSender(sender, index.Expiring, func(tm *index.Timer) {
		switch {
		case tm.Has(index.Superseded):
		case tm.Presence == index.Unsent:
			unsent++
		case state == 0 || tm.State() != state:
			count++
		}
	})
	return count < t.cfg.MaxRunningPerUser && unsent < unsentFactor*t.cfg.MaxRunningPerUser
}

// Activate makes the timer run. It is called when the roomserver has answered, whatever the answer was. If the event did not reach its
// room, the first attempt finds out; an event with an unknown fate must not lose its timer.
func (p *Pending) Activate(sent bool) {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	if !p.timer.Live() { // the output stream was faster than the roomserver's answer
		return
	}
	p.timer.Presence = index.Confirmed
	if !sent {
		p.timer.Presence = index.Unsent
		if !p.existed {
			p.t.index.Repeatable(p.timer)
		}
	}
	p.t.activateWithMu(p.timer)
}

// activateWithMu makes a pending timer run. If a lookup has meanwhile marked the timer MaybeReplaced, the scheduler settles that doubt
// first. If the timer was claimed meanwhile, the scheduler sees to it that the claim is carried out.
func (t *Timers) activateWithMu(tm *index.Timer) {
	wake := tm.Due
	if tm.Has(index.MaybeReplaced) {
		wake = min(wake, t.clock.now()+lookAgainAfter)
	}
	if _, scheduled := tm.Wake(); !t.index.Activate(tm, wake) && tm.Phase() == index.Claimed && !scheduled {
		t.index.Schedule(tm, t.clock.now())
	}
	t.notify()
}

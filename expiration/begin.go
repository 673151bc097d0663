package expiration

import (
	"context"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// Pending is a timer whose event is on its way into the room.
type Pending struct {
	t       *Timers
	timer   ref
	existed bool // the timer is that of an equal event, which another request sent
}

// Begin stores the timer of an event that is about to be given to the roomserver. The deadline is the given duration,
// which must be positive, from now. The limit of running timers does not hold for exempt users; for others the error is
// a *LimitError when it is reached. A timer that the new event replaces does not count, nor does, within bounds, one whose
// event the roomserver has failed to take, or does not know: most likely it never runs.
func (t *Timers) Begin(ctx context.Context, e Event, duration time.Duration, exempt bool) (*Pending, error) {
	r, existed, err := t.insert(ctx, Timer{Event: e, Duration: duration}, exempt)
	if err != nil {
		return nil, err
	}
	return &Pending{t: t, timer: r, existed: existed}, nil
}

// insert takes a timer in and stores it, with the deadline counted from now. The scheduler does not look at it yet. It may be
// there already: equal messages, built in the same millisecond upon the same events, are one event.
func (t *Timers) insert(ctx context.Context, row Timer, exempt bool) (r ref, existed bool, err error) {
	now := t.clock.now()
	due := now + row.Duration
	row.TokenHash = HashToken(t.tokens.Token(row.Event.ID))
	row.Received, row.Deadline = t.clock.stored(now), t.clock.stored(due)
	digest := t.tokens.Digest(row)

	t.mu.Lock()
	for same := t.index.token(row.TokenHash, row.Delayed != nil); t.index.at(same) != nil && !t.index.at(same).gone; {
		t.mu.Unlock()
		// Its row may be on its way, and fail to come. Whoever is told that there is a timer relies on the row.
		unlock, err := t.lockRow(ctx, same)
		if err != nil {
			return ref{}, false, err
		}
		unlock()
		t.mu.Lock()
		if tm := t.index.at(same); tm != nil && !tm.gone {
			t.mu.Unlock()
			return same, true, nil
		}
		same = t.index.token(row.TokenHash, row.Delayed != nil)
	}
	err = t.index.room()
	if err == nil && !exempt {
		err = t.overLimit(row.Delayed != nil, digest, now)
	}
	if err != nil {
		t.mu.Unlock()
		return ref{}, false, err
	}
	row.NID = t.index.lastNID + 1
	// Whoever finds the timer from now on waits until it is decided whether there is a row. Nobody has the lock of a new number, so
	// that nothing is waited for here.
	unlock, _ := t.rows.Lock(context.Background(), row.NID)
	defer unlock()
	r = t.index.add(newIndexed(row, digest), due)
	t.index.at(r).pending = true
	t.mu.Unlock()
	if err = t.write(ctx, r, row, digest); err != nil {
		return ref{}, false, err
	}
	return r, false, nil
}

// write writes the row of a new timer under the row's lock, and takes the timer out if that fails.
func (t *Timers) write(ctx context.Context, r ref, row Timer, d Digest) (err error) {
	written := false
	defer func() { // also after a panic
		if written {
			return
		}
		t.mu.Lock()
		t.index.remove(r)
		t.mu.Unlock()
		t.metrics.errors.WithLabelValues("insert").Inc()
		t.removeRowLocked(ctx, r) // it may have been written all the same
	}()
	failpoint.Pass(failpoint.BeforeInsert)
	if err = t.store.Insert(ctx, row, d); err != nil {
		return fmt.Errorf("storing the timer of %s: %w", row.Event.ID, err)
	}
	written = true
	failpoint.Pass(failpoint.AfterInsert)
	return nil
}

// overLimit returns an error if the sender may not have another timer of this kind. Timers.mu is held.
func (t *Timers) overLimit(delayed bool, d Digest, now time.Duration) error {
	var (
		state         uint64
		count, unsent int
		first         time.Duration
	)
	limit := t.cfg.MaxScheduledPerUser
	if !delayed {
		limit, state = t.cfg.MaxRunningPerUser, d.get(digestState)
	}
	t.index.ofSender(d.get(digestSender), func(_ ref, tm *timer) {
		if tm.delayed != delayed || tm.superseded {
			return
		}
		if end := max(tm.due, tm.wake); count+unsent == 0 || end < first {
			first = end
		}
		switch {
		case tm.unsent:
			unsent++
		case state == 0 || tm.state != state:
			count++
		}
	})
	if count < limit && unsent < unsentFactor*limit {
		return nil
	}
	return &LimitError{RetryAfter: max(first-now, 0)}
}

// Activate makes the timer run. It is called when the roomserver has answered, whatever the answer was: an event that is
// not in its room is found out when the timer fires, and one whose fate is unknown must not lose its timer.
func (p *Pending) Activate(sent bool) {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	tm := p.t.index.at(p.timer)
	if tm == nil || tm.gone { // the stream can be faster than the roomserver's answer
		return
	}
	tm.confirmed, tm.unsent = sent, !sent
	if !sent && !p.existed {
		p.t.index.addToRequests(p.timer.slot, tm)
	}
	p.t.activate(p.timer, tm)
}

// activate makes the scheduler look at a timer that was pending. If somebody has found it meanwhile and could not tell yet whether its
// event is replaced, that is looked at first. Timers.mu is held.
func (t *Timers) activate(r ref, tm *timer) {
	wake := tm.due
	if tm.doubtful {
		wake = min(wake, t.clock.now()+lookAgainAfter)
	}
	tm.pending = false
	t.index.schedule(r, wake)
	t.notify()
}

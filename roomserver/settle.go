package roomserver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/dendritefix"
)

const (
	// laneSettles is how long one attempt that a deadline started waits for a room's queue. It is short, because the attempt holds a place
	// that other rooms need. The next attempt goes on waiting.
	laneSettles = 500 * time.Millisecond
	// callerSettles is how long a request that ends or sends an event waits. It is longer than the five seconds in which a room's worker
	// ignores its queue, see dendritefix.QuietRooms.
	callerSettles = 7 * time.Second
	// settlesFor is how long all attempts together wait for a room. Another server can keep the queue busy for ever, so after
	// this time the event is sent in any case.
	settlesFor = 10 * time.Second
	// settleMemory is how long a wait for a room is remembered after the last attempt. It is longer than the longest pause between two
	// attempts.
	settleMemory = time.Minute
	// firstPoll is the pause after the first look at a queue. It doubles with each further look, up to lastPoll.
	firstPoll = 10 * time.Millisecond
	lastPoll  = 250 * time.Millisecond
	// settleWake is the pause between two attempts to wake a room's worker. All attempts that wait for the room share it.
	settleWake = time.Second
	// maxSettled is how many rooms are remembered. It bounds the memory to some ten megabytes.
	maxSettled = 50_000
)

// errUnsettled: the roomserver has not processed the room's queue yet. It is a passing fault.
var errUnsettled = errors.New("the roomserver has not dealt with what came for the room before")

// inTurn is wait for an event that is due: it also keeps the order of the room's deadlines.
func (s *settled) inTurn(ctx context.Context, roomID string, deadline time.Time) error {
	err := s.wait(ctx, roomID, laneSettles)
	if s.owes(roomID, deadline, err != nil) {
		return errUnsettled
	}
	return err
}

// wait returns when the roomserver has processed the present contents of a room's queue. The error is errUnsettled if that takes longer
// than patience, but nil if all attempts together have waited for settlesFor.
func (s *settled) wait(ctx context.Context, roomID string, patience time.Duration) error {
	look, empty := s.begin(roomID)
	if empty {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := s.drain(ctx, roomID)
	if err == nil && s.mayBeRedacted(roomID) { // asked last: processing the queue can fetch redactions
		err = s.hear(ctx, roomID)
	}
	switch {
	case err == nil:
		s.dealtWith(roomID, look)
	case s.waited(roomID):
		err = nil
	}
	return err
}

// drain waits until the present contents of a room's queue are processed. It wakes the room's worker if no message is in work.
func (s *settled) drain(ctx context.Context, roomID string) error {
	b, err := s.queues.Backlog(ctx, roomID)
	all := b.Taken + b.Waiting
	for p := firstPoll; err == nil && !b.Empty() && b.Done < all; p = min(2*p, lastPoll) {
		if b.InWork == 0 && s.mayWake(roomID) {
			if err = s.queues.Wake(ctx, roomID); err != nil {
				return err
			}
		}
		if err = pause(ctx, p); err != nil {
			return err
		}
		b, err = s.queues.Backlog(ctx, roomID)
	}
	return err
}

// hear waits until the timers have processed the output stream up to its present end. That is necessary only in room versions in which
// Dendrite does not apply some redactions, see dendritefix.RedactsInContent. In others the room itself shows its redactions.
func (s *settled) hear(ctx context.Context, roomID string) error {
	version, err := s.version(ctx, roomID)
	switch {
	case err != nil: // the database failed, or the room is unknown: Dendrite does not say which
		return fmt.Errorf("%w: looking up the room version: %w", errUnsettled, err)
	case !dendritefix.RedactsInContent(version):
		return nil
	}
	written, err := s.output.written(ctx)
	if err != nil {
		return err
	}
	for p := firstPoll; ; p = min(2*p, lastPoll) {
		heard, err := s.output.heard(ctx)
		if err != nil || heard >= written {
			return err
		}
		if err = pause(ctx, p); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", errUnsettled, ctx.Err())
	case <-time.After(d):
		return nil
	}
}

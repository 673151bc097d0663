package expiration

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

const (
	// attemptTimeout limits the first attempt to close an event. It doubles with each failed attempt, up to lastAttemptTimeout. So an
	// attempt that hangs ends soon, and a slow roomserver gets enough time eventually.
	attemptTimeout     = 10 * time.Second
	lastAttemptTimeout = time.Minute
	// requestTimeout limits an attempt whose caller waits for the answer.
	requestTimeout = 30 * time.Second
	// sendPatience is how long a send waits for a half-done event of the same piece of state.
	sendPatience = 3 * time.Second
	// maxUnsendable is the number of attempts after which an unsendable event is given up.
	maxUnsendable = 3
	// wakeTimeout is how long the roomserver may take to show that it answers at all.
	wakeTimeout = 2 * time.Second
)

// UnsendableError says that an event cannot be sent although neither database nor roomserver failed: the next attempt will fail in the same
// way. After maxUnsendable attempts the event is given up.
type UnsendableError struct{ Cause error }

func (e *UnsendableError) Error() string { return fmt.Sprintf("the event cannot be sent: %s", e.Cause) }

func (e *UnsendableError) Unwrap() error { return e.Cause }

// panicError is a recovered panic, with its stack.
type panicError struct {
	value any
	stack []byte
}

func (e *panicError) Error() string { return fmt.Sprintf("panic: %v", e.value) }

// recovered is deferred by a function that returns a panic as an *UnsendableError. The same input would panic again.
func recovered(err *error) {
	if value := recover(); value != nil {
		*err = &UnsendableError{Cause: &panicError{value, debug.Stack()}}
	}
}

func isUnsendable(err error) bool { return errors.As(err, new(*UnsendableError)) }

// countUnsendable counts the attempts to send an unsendable event. It returns the error, or a *DropError after the last attempt. A request
// to send a delayed event does not count, because the event stays scheduled.
func (t *Timers) countUnsendable(tm *index.Timer, row Timer, o Outcome, err error) error {
	if panicked := (*panicError)(nil); errors.As(err, &panicked) {
		t.metrics.errors.WithLabelValues("panic").Inc()
		t.log.WithFields(logrus.Fields{
			"timer_nid": tm.NID(), "event_id": row.Event.ID, "room_id": row.Event.RoomID, "panic": panicked.value, "stack": string(panicked.stack),
		}).Error("Sending an event panicked")
	}
	if row.Delayed != nil && o == Ended {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if tm.Unsendable++; tm.Unsendable < maxUnsendable {
		return err
	}
	// The cause is flattened to its text, so that errors.As finds no *UnsendableError in the *DropError.
	return &DropError{Reason: Unsendable, Cause: errors.New(err.Error())}
}

// NotTakenError says that the roomserver got an event that was claimed earlier, and returned an error that may pass.
type NotTakenError struct{ Cause error }

func (e *NotTakenError) Error() string {
	return "the roomserver did not take the event: " + e.Cause.Error()
}

func (e *NotTakenError) Unwrap() error { return e.Cause }

// countUntaken counts the attempts in which the roomserver got an event and did not take it, although it works otherwise. It returns the
// error, or a *DropError after too many of them. Requests do not count, because clients repeat them as often as they like.
//
// If the attempt took all its time, an answer to Wake shows that the roomserver works; asking also makes the room's worker go on. An answer
// to Wake takes no database, so after an error it shows nothing.
func (t *Timers) countUntaken(attempt context.Context, tm *index.Timer, e Event, o Outcome, err error) error {
	unanswered := errors.Is(attempt.Err(), context.DeadlineExceeded)
	if !unanswered && !errors.As(err, new(*NotTakenError)) {
		return err
	}
	works := false
	if unanswered {
		ctx, cancel := context.WithTimeout(t.ctx, wakeTimeout)
		defer cancel()
		works = t.roomserver.Wake(ctx, e.RoomID) == nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	// Wake itself may be slow because of this room. That another event was taken lately shows that the roomserver works, too.
	if !works && (t.lastAnswer == 0 || t.clock.now()-t.lastAnswer >= lastAttemptTimeout) {
		return err
	}
	tm.Unanswered = tm.Unanswered || unanswered
	if o != Expired {
		return err
	}
	if tm.Untaken = min(tm.Untaken+1, givenUpAfter+1); tm.Untaken > givenUpAfter {
		return &DropError{Reason: Unanswered, Cause: err}
	}
	return err
}

// patience returns how long the next attempt may take.
func (t *Timers) patience(tm *index.Timer) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return min(attemptTimeout<<tm.Failures, lastAttemptTimeout)
}

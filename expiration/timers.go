package expiration

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
)

// Config is what the component itself can be told; see docs/configuration.md.
type Config struct {
	// MaxRunningPerUser is how many timers one user may have running.
	MaxRunningPerUser int
	// RestartGrace is how long after Start every timer runs at least, so that live clients can refresh first. 0: timers
	// that ran out while the server was down fire at once.
	RestartGrace time.Duration
}

const (
	// closers is how many rooms have a closing event built at the same time. They mostly wait for the roomserver.
	closers = 16
	// pollInterval is how long a lost wake-up can delay anything.
	pollInterval = 5 * time.Second
	// attemptTimeout ends an attempt to close, so that a roomserver that does not answer holds its lane no longer.
	attemptTimeout = time.Minute
	// recoverTimeout is how long Start waits for what an earlier process claimed and did not finish.
	recoverTimeout = 10 * time.Second
	// stopPatience is how long Stop waits for the closings that are under way.
	stopPatience = 5 * time.Second
	// firstPause is the pause after the first failed attempt; it doubles with each further one up to lastPause.
	firstPause = 500 * time.Millisecond
	lastPause  = 30 * time.Second
	// refusedFor is how long the token of a sender who is gone is told so at /end, before it is a token like any unknown
	// one.
	refusedFor = 5 * time.Minute
	// retriedFor is how long at least a request is known whose timer is gone; Dendrite itself knows those that went well for
	// as long.
	retriedFor = 30 * time.Minute
	// neverSentAfter is how many times in a row the roomserver can say that it does not know an event. With lastPause
	// between them it is more than an hour, in which the roomserver's queue brings what a crash has left in it: Dendrite
	// waits some five minutes for that.
	neverSentAfter = 125
	// unsentFactor times as many timers as may be running can a user have whose events the roomserver has failed to take.
	unsentFactor = 10
)

// Timers is the component. See the package comment for what it guarantees.
type Timers struct {
	cfg        Config
	store      Store
	roomserver Roomserver
	commits    *groupCommit
	tokens     *Tokens
	metrics    *metrics
	log        *logrus.Entry
	clock      clock

	closings *keyedLocks[string] // by event ID
	states   *keyedLocks[StateKey]
	requests *keyedLocks[RequestHash]
	lanes    *lanes

	wakeup  chan struct{} // of capacity 1: the first wake has come nearer
	ctx     context.Context
	stop    context.CancelFunc
	workers sync.WaitGroup // started by Start, ended by Stop
	watcher sync.WaitGroup // likewise

	mu     sync.Mutex // guards what follows, and the timers in index, as it says there
	index  index
	forgot time.Time // when requests were forgotten last
}

// New returns the component. It does nothing before Start.
func New(cfg Config, store Store, roomserver Roomserver, tokens *Tokens) *Timers {
	t := &Timers{
		cfg: cfg, store: store, roomserver: roomserver, tokens: tokens,
		commits:  newGroupCommit(store),
		log:      logrus.WithField("component", "expiration"),
		clock:    newClock(),
		closings: newKeyedLocks[string](),
		states:   newKeyedLocks[StateKey](),
		requests: newKeyedLocks[RequestHash](),
		lanes:    newLanes(),
		wakeup:   make(chan struct{}, 1),
		index:    newIndex(),
	}
	t.metrics = newMetrics(func() float64 {
		t.mu.Lock()
		defer t.mu.Unlock()
		return float64(len(t.index.byEvent))
	})
	return t
}

// Collectors returns the component's metrics, to be registered once.
func (t *Timers) Collectors() []prometheus.Collector { return t.metrics.collectors() }

// Start loads the timers, finishes what an earlier process had claimed, and starts to watch the deadlines, until Stop is
// called or ctx is done. It must return before events are sent or tokens used.
func (t *Timers) Start(ctx context.Context) error {
	now := time.Now()
	t.forgot = now
	var claimed []*timer
	t.mu.Lock()
	err := t.store.Timers(ctx, func(row Timer) error {
		tm := newTimer(row)
		tm.due = t.clock.moment(row.Deadline)
		if earliest := now.Add(t.cfg.RestartGrace); t.cfg.RestartGrace > 0 && tm.due.Before(earliest) {
			tm.due = earliest
		}
		t.index.add(tm)
		if row.Event.Request != nil {
			t.index.byRequest[row.Event.Request.Hash] = tm
		}
		if tm.claim != nil {
			claimed = append(claimed, tm)
			return nil
		}
		t.index.schedule(tm, tm.due)
		return nil
	})
	t.mu.Unlock()
	if err != nil {
		return fmt.Errorf("loading the timers of expiring events: %w", err)
	}

	failpoint.Pass(failpoint.AfterLoad)
	t.ctx, t.stop = context.WithCancel(ctx)
	for range closers {
		t.workers.Go(func() { t.lanes.work(t.closeDue) })
	}
	t.recover(claimed)
	t.watcher.Go(t.watch)
	return nil
}

// Stop lets the closings that are under way come to their end, within stopPatience and while the context of Start lasts,
// and ends all goroutines. What is left is taken up by the next Start. Stop may be called more than once.
func (t *Timers) Stop() {
	if t.stop == nil {
		return
	}
	t.lanes.stop()
	impatient := time.AfterFunc(stopPatience, t.stop)
	defer impatient.Stop()
	t.workers.Wait()
	t.stop()
	t.watcher.Wait()
}

// Ping reports whether the component can reach its database.
func (t *Timers) Ping(ctx context.Context) error { return t.store.Ping(ctx) }

// Token returns the refresh token of an event, running or not.
func (t *Timers) Token(eventID string) string { return t.tokens.Token(eventID) }

// LockState waits for the lock of a piece of state and returns the function that gives it back. It is held while an
// event for that state is built and given to the roomserver. A closing event that an earlier fault left half done is
// finished first, so that it does not come behind what is sent now.
func (t *Timers) LockState(ctx context.Context, s StateKey) (unlock func(), err error) {
	unlock, err = t.states.lock(ctx, s)
	if err != nil {
		return nil, err
	}
	for _, tm := range t.unfinished(s) {
		if err = t.attempt(ctx, tm, Expired); err != nil && !isFinal(err) {
			unlock()
			return nil, fmt.Errorf("finishing the closing event of %s: %w", tm.event.ID, err)
		}
	}
	return unlock, nil
}

// Pending is a timer whose event is on its way into the room.
type Pending struct {
	t       *Timers
	tm      *timer
	request *RequestHash // nil if the request cannot be repeated
}

// Begin stores the timer of an event that is about to be given to the roomserver. The deadline is the given duration,
// which must be positive, from now. The limit of running timers does not hold for exempt users; for others the error is
// a *LimitError when it is reached. A timer that the new event replaces does not count, nor does, within bounds, one whose
// event the roomserver has failed to take: most likely it never runs.
func (t *Timers) Begin(ctx context.Context, e Event, duration time.Duration, exempt bool) (*Pending, error) {
	now := time.Now()
	row := Timer{
		Event: e, TokenHash: HashToken(t.tokens.Token(e.ID)), Duration: duration,
		Received: t.clock.stored(now), Deadline: t.clock.stored(now.Add(duration)),
	}
	tm := newTimer(row)
	tm.due = now.Add(duration)

	t.mu.Lock()
	if same := t.index.byEvent[e.ID]; same != nil {
		// Equal messages, built in the same millisecond upon the same events, are one event.
		t.mu.Unlock()
		return &Pending{t: t, tm: same}, nil
	}
	if !exempt {
		if err := t.overLimit(e, now); err != nil {
			t.mu.Unlock()
			return nil, err
		}
	}
	tm.pending = true
	t.index.add(tm)
	t.mu.Unlock()

	failpoint.Pass(failpoint.BeforeInsert)
	if err := t.store.Insert(ctx, row); err != nil {
		t.mu.Lock()
		t.index.remove(tm)
		t.mu.Unlock()
		t.metrics.errors.WithLabelValues("insert").Inc()
		t.removeRow(ctx, tm) // it may have been written all the same
		return nil, fmt.Errorf("storing the timer of %s: %w", e.ID, err)
	}
	failpoint.Pass(failpoint.AfterInsert)
	p := &Pending{t: t, tm: tm}
	if e.Request != nil {
		p.request = &e.Request.Hash
	}
	return p, nil
}

// overLimit returns an error if the event's sender may not have another timer. Timers.mu is held.
func (t *Timers) overLimit(e Event, now time.Time) error {
	timers := t.index.byUser[e.Sender]
	if len(timers) < t.cfg.MaxRunningPerUser {
		return nil
	}
	s, isState := e.State()
	var (
		running, unsent int
		first           time.Time
	)
	for tm := range timers {
		switch other, ok := tm.event.State(); {
		case tm.unsent:
			unsent++
		case !isState || !ok || s != other:
			running++
		}
		if first.IsZero() || tm.due.Before(first) {
			first = tm.due
		}
	}
	if running < t.cfg.MaxRunningPerUser && unsent < unsentFactor*t.cfg.MaxRunningPerUser {
		return nil
	}
	return &LimitError{RetryAfter: max(first.Sub(now), 0)}
}

// Activate makes the timer run. It is called when the roomserver has answered, whatever the answer was: an event that is
// not in its room is found out when the timer fires, and one whose fate is unknown must not lose its timer.
func (p *Pending) Activate(sent bool) {
	p.t.mu.Lock()
	defer p.t.mu.Unlock()
	p.tm.confirmed, p.tm.unsent = sent, !sent
	p.tm.pending = false
	if !sent && p.request != nil {
		p.t.index.byRequest[*p.request] = p.tm
	}
	if !p.tm.gone { // the stream can be faster than the roomserver's answer
		p.t.index.schedule(p.tm, p.tm.due)
		p.t.notify()
	}
}

// LockRequest waits until no other request with this hash is being dealt with, and returns the function that lets the next
// one in. What a client repeats because it was impatient must find what came of it the first time.
func (t *Timers) LockRequest(ctx context.Context, request RequestHash) (unlock func(), err error) {
	return t.requests.lock(ctx, request)
}

// Sent returns the ID of the event that was accepted from a request which is repeated now, by an earlier process, or by this
// one if the roomserver failed to take it; or "" if there is none. The event is in its room then, even if it was not before.
func (t *Timers) Sent(ctx context.Context, request RequestHash) (eventID string, err error) {
	t.mu.Lock()
	tm := t.index.byRequest[request]
	t.mu.Unlock()
	if tm == nil {
		return "", nil
	}
	err = t.confirm(ctx, tm)
	if errors.Is(err, ErrUnknownEvent) {
		err = t.sendAgain(ctx, tm)
	}
	switch {
	case err == nil:
		return tm.event.ID, nil
	case isFinal(err):
		return "", nil
	}
	return "", fmt.Errorf("sending %s again: %w", tm.event.ID, err)
}

// sendAgain gives an event to the roomserver that it does not have, or has in its queue.
func (t *Timers) sendAgain(ctx context.Context, tm *timer) error {
	row, err := t.store.Timer(ctx, tm.event.ID)
	if err != nil {
		return err
	}
	if err = t.roomserver.Resubmit(ctx, tm.event, row.Event.Request.Signed); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tm.confirmed, tm.unsent = true, false
	return nil
}

// Running reports whether there is a running timer for an event of this sender.
func (t *Timers) Running(eventID, sender string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm := t.index.byEvent[eventID]
	return tm != nil && tm.running() && tm.event.Sender == sender
}

// Known reports whether a token was issued by this server and has not been forgotten: it may still be refused.
func (t *Timers) Known(h TokenHash) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.index.byToken[h] != nil
}

// Refresh restarts the timer of a token with its stored duration. When it returns nil, the new deadline is durable. The
// error is ErrNotFound if no such timer runs; after any other error the timer stands as it was, or as refreshed.
func (t *Timers) Refresh(ctx context.Context, h TokenHash) error {
	t.mu.Lock()
	tm := t.index.byToken[h]
	t.mu.Unlock()
	if tm == nil {
		return ErrNotFound
	}
	return t.refresh(ctx, tm, 0)
}

// Restart gives the running timer of an event a new duration, counted from now (contract, section 1: a state event sent
// again with identical content). The caller holds the lock of the event's state key.
func (t *Timers) Restart(ctx context.Context, eventID string, duration time.Duration) error {
	t.mu.Lock()
	tm := t.index.byEvent[eventID]
	t.mu.Unlock()
	if tm == nil {
		return ErrNotFound
	}
	// It is the current state, and yet clients may not have seen it: a crash can leave it so.
	if err := t.confirm(ctx, tm); err != nil {
		return fmt.Errorf("sending %s again: %w", eventID, err)
	}
	return t.refresh(ctx, tm, duration)
}

// refresh sets a new deadline, and a new duration if it is not 0.
func (t *Timers) refresh(ctx context.Context, tm *timer, duration time.Duration) error {
	tm.row.Lock()
	defer tm.row.Unlock()
	t.mu.Lock()
	running := tm.running()
	if duration == 0 {
		duration = tm.duration
	}
	t.mu.Unlock()
	if !running {
		return ErrNotFound
	}
	due := time.Now().Add(duration)
	deadline := t.clock.stored(due)
	failpoint.Pass(failpoint.BeforeRefresh)
	ok, err := t.commits.refresh(ctx, Refresh{EventID: tm.event.ID, Duration: duration, Deadline: deadline})
	if err != nil {
		t.metrics.errors.WithLabelValues("refresh").Inc()
		return fmt.Errorf("storing the new deadline of %s: %w", tm.event.ID, err)
	}
	if !ok {
		if err = t.reload(ctx, tm); err != nil {
			return err
		}
		return ErrNotFound
	}
	failpoint.Pass(failpoint.AfterRefresh)
	t.mu.Lock()
	tm.duration, tm.due, tm.deadline = duration, due, deadline
	tm.unsure, tm.failures = false, 0
	nearer := tm.place >= 0 && due.Before(tm.wake)
	if nearer {
		t.index.schedule(tm, due)
	}
	t.mu.Unlock()
	if nearer {
		t.notify()
	}
	return nil
}

// End closes the event of a token now. When it returns nil, the closing event is in the room. The error is ErrNotFound
// if no such timer runs, a *DropError if the sender may not send the closing event, and else a passing fault: the timer
// goes on, and End may be called again.
func (t *Timers) End(ctx context.Context, h TokenHash) error {
	t.mu.Lock()
	tm := t.index.byToken[h]
	refused := tm != nil && tm.refused
	if refused {
		t.index.forget(tm)
	}
	t.mu.Unlock()
	switch {
	case tm == nil:
		return ErrNotFound
	case refused:
		return &DropError{Reason: SenderGone}
	}
	// A closing that has begun is not given up because the caller hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), attemptTimeout)
	defer cancel()
	err := t.close(ctx, tm, Ended)
	var dropped *DropError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &dropped):
		if dropped.Reason == Forbidden || dropped.Reason == SenderGone {
			return err
		}
		return ErrNotFound
	case errors.Is(err, ErrNotFound):
		return ErrNotFound
	}
	return fmt.Errorf("ending %s: %w", tm.event.ID, err)
}

// StateChanged stops the timers of a piece of state whose event is not the current state any more. It is called when a
// state event that this server sent has come to the roomserver.
func (t *Timers) StateChanged(ctx context.Context, s StateKey) {
	var timers []*timer
	t.mu.Lock()
	for _, tm := range t.index.byState[s] {
		if tm.running() && !tm.pending {
			timers = append(timers, tm)
		}
	}
	t.mu.Unlock()
	if len(timers) == 0 {
		return
	}
	current, err := t.roomserver.CurrentState(ctx, s)
	if err != nil {
		// The output stream tells of the change too, and the closing looks again.
		t.metrics.errors.WithLabelValues("current_state").Inc()
		t.log.WithError(err).WithField("room_id", s.RoomID).Error("Failed to look up the current state")
		return
	}
	for _, tm := range timers {
		if tm.event.ID != current {
			t.drop(ctx, tm, Replaced)
		}
	}
}

// RoomChanged does what StateChanged does for all state of a room. It is called when the whole state was rewritten.
func (t *Timers) RoomChanged(ctx context.Context, roomID string) {
	states := map[StateKey]struct{}{}
	for _, tm := range t.timersIn(roomID) {
		if s, ok := tm.event.State(); ok {
			states[s] = struct{}{}
		}
	}
	for s := range states {
		t.StateChanged(ctx, s)
	}
}

// DropEvent stops the timer of an event, if it has one that runs. No closing event will be sent.
func (t *Timers) DropEvent(ctx context.Context, eventID string, reason DropReason) {
	t.mu.Lock()
	tm := t.index.byEvent[eventID]
	t.mu.Unlock()
	if tm != nil {
		t.drop(ctx, tm, reason)
	}
}

// DropSender stops the timers of a user in a room whose events were accepted before the given time.
func (t *Timers) DropSender(ctx context.Context, roomID, userID string, before time.Time) {
	t.mu.Lock()
	var timers []*timer
	for tm := range t.index.byUser[userID] {
		if tm.event.RoomID == roomID && tm.received.Before(before) {
			timers = append(timers, tm)
		}
	}
	t.mu.Unlock()
	for _, tm := range timers {
		t.drop(ctx, tm, SenderGone)
	}
}

// DropRoom stops all timers of a room.
func (t *Timers) DropRoom(ctx context.Context, roomID string) {
	for _, tm := range t.timersIn(roomID) {
		t.drop(ctx, tm, RoomGone)
	}
}

// drop stops a running timer. One that is claimed is left to whoever closes it.
func (t *Timers) drop(ctx context.Context, tm *timer, reason DropReason) {
	tm.row.Lock()
	t.mu.Lock()
	running := tm.running()
	if running {
		t.index.remove(tm)
		if now := time.Now(); reason == SenderGone && tm.due.After(now) {
			t.index.refuse(tm, now.Add(min(tm.due.Sub(now), refusedFor)))
		}
	}
	t.mu.Unlock()
	tm.row.Unlock()
	if !running {
		return
	}
	t.metrics.drops.WithLabelValues(string(reason)).Inc()
	t.log.WithFields(logrus.Fields{
		"event_id": tm.event.ID, "room_id": tm.event.RoomID, "reason": reason,
	}).Debug("Dropped the timer of an expiring event")
	failpoint.Pass(failpoint.BeforeDrop)
	t.removeRow(ctx, tm)
}

// removeRow deletes the row of a timer that is gone. If that fails, the scheduler tries again later. A claim that failed goes
// too, written or not: its closing event was given to nobody.
func (t *Timers) removeRow(ctx context.Context, tm *timer) {
	tm.row.Lock()
	defer tm.row.Unlock()
	t.mu.Lock()
	remove := t.store.Drop
	if tm.claim != nil || tm.unsure {
		remove = t.store.Delete
	}
	t.mu.Unlock()
	err := remove(ctx, tm.event.ID)
	failpoint.Pass(failpoint.AfterDelete)
	t.mu.Lock()
	if err == nil {
		delete(t.index.left, tm)
	} else {
		t.index.left[tm] = struct{}{}
	}
	t.mu.Unlock()
	if err != nil {
		t.metrics.errors.WithLabelValues("delete").Inc()
		t.log.WithError(err).WithField("event_id", tm.event.ID).Error("Failed to delete the timer of an expiring event")
		t.scheduleRetry(tm)
	}
}

// removeLeftRow tries again what removeRow could not do.
func (t *Timers) removeLeftRow(ctx context.Context, tm *timer) {
	t.mu.Lock()
	_, left := t.index.left[tm]
	t.mu.Unlock()
	if left {
		t.removeRow(ctx, tm)
	}
}

// Settle deletes the rows of timers that were stopped and could not be deleted then. Until it has returned nil, a crash
// could bring back a timer that was stopped before.
func (t *Timers) Settle(ctx context.Context) error {
	t.mu.Lock()
	left := slices.Collect(maps.Keys(t.index.left))
	t.mu.Unlock()
	for _, tm := range left {
		t.removeRow(ctx, tm)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.index.left); n > 0 {
		return fmt.Errorf("%d stopped timers still have their rows", n)
	}
	return nil
}

// scheduleRetry makes the scheduler look at the timer again after a pause that grows with each failure.
func (t *Timers) scheduleRetry(tm *timer) {
	t.mu.Lock()
	pause := min(firstPause<<min(tm.failures, 16), lastPause)
	tm.failures++
	t.index.schedule(tm, time.Now().Add(pause))
	t.mu.Unlock()
	t.notify()
}

// reload makes memory say of a timer what its row says. The timer's row lock is held.
func (t *Timers) reload(ctx context.Context, tm *timer) error {
	row, err := t.store.Timer(ctx, tm.event.ID)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return fmt.Errorf("reading the timer of %s: %w", tm.event.ID, err)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	tm.unsure = false
	switch {
	case tm.gone:
	case err != nil:
		t.index.remove(tm)
	default:
		tm.claim = row.Claim
		tm.duration = row.Duration
		if !row.Deadline.Equal(tm.deadline) {
			tm.deadline, tm.due = row.Deadline, t.clock.moment(row.Deadline)
		}
	}
	return nil
}

// unfinished returns the timers of a piece of state that are claimed and not closed.
func (t *Timers) unfinished(s StateKey) (timers []*timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tm := range t.index.byState[s] {
		if tm.claim != nil {
			timers = append(timers, tm)
		}
	}
	return timers
}

// timersIn looks at every timer: whole rooms change rarely.
func (t *Timers) timersIn(roomID string) []*timer {
	t.mu.Lock()
	defer t.mu.Unlock()
	var timers []*timer
	for _, tm := range t.index.byEvent {
		if tm.event.RoomID == roomID {
			timers = append(timers, tm)
		}
	}
	return timers
}

// notify tells the scheduler that the first wake may have come nearer.
func (t *Timers) notify() {
	select {
	case t.wakeup <- struct{}{}:
	default:
	}
}

func newTimer(row Timer) *timer {
	row.Event.Request = nil // nobody asks for it but in a later process
	return &timer{
		event: row.Event, hash: row.TokenHash, received: row.Received,
		duration: row.Duration, deadline: row.Deadline, claim: row.Claim, place: -1,
	}
}

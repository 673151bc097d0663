package expiration

import (
	"context"
	"encoding/json"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
)

// Config is the configuration of the engine; see docs/configuration.md.
type Config struct {
	// MaxRunningPerUser is how many expiring events one user may have running.
	MaxRunningPerUser int
	// MaxScheduledPerUser is how many delayed events one user may have scheduled, and MaxScheduledPerServiceUser how many a user of an
	// application service may.
	MaxScheduledPerUser, MaxScheduledPerServiceUser int
	// KeepFinalised is how long a finalised delayed event can be looked up. MaxFinalisedPerUser is how many of them are kept for one user.
	KeepFinalised       time.Duration
	MaxFinalisedPerUser int
	// RestartGrace is the least time for which every timer runs after Start, so that live clients can refresh first. With 0, a timer that
	// expired while the server was down fires at once. Delayed events wait maxDelayedGrace at most. A timer with a delegation waits keptGrace at
	// least.
	RestartGrace time.Duration
	// TokenLimit limits the requests with one token or one delay ID.
	TokenLimit RateLimit
	// DueLimit limits the delayed events of one user that are sent when they are due. Application services are exempt.
	DueLimit RateLimit
	// Explain returns the error that the owner of a delayed event sees if the event ended with a *DropError. The engine stores the result
	// and does not read it.
	Explain func(error) json.RawMessage
}

const (
	// pollInterval bounds the delay that a lost wake-up can cause.
	pollInterval = 5 * time.Second
	// maxDelayedGrace bounds Config.RestartGrace for delayed events, which MSC4140 allows to be sent 30 seconds late.
	maxDelayedGrace = 30 * time.Second
	// sweepPause is how long rows of closed events are collected before they are deleted. In a mass expiry, the deletes then come after the
	// claims. After a crash in between, the closing events are given to the roomserver again.
	sweepPause = time.Second
	// lookAgainAfter is the pause before the scheduler checks a piece of state once more.
	lookAgainAfter = time.Second
	// recoverTimeout is how long Start waits for events that an earlier process claimed and did not finish.
	recoverTimeout = 10 * time.Second
	// stopPatience is how long Stop waits for attempts that are in progress.
	stopPatience = 5 * time.Second
	// firstPause is the backoff after the first failed attempt. It doubles with each further one, up to lastPause.
	firstPause = 500 * time.Millisecond
	lastPause  = 30 * time.Second
	// manyTimers is the number of timers from which it pays to return memory to the operating system after loading.
	manyTimers = 10_000
	// loadingGCPercent is by how much the heap may grow between two collections while timers are loaded.
	loadingGCPercent = 400
	// maxFailures is the limit up to which failures are counted.
	maxFailures = 16
	// usualAttempt is how long an attempt takes at most if nothing is wrong. Until it is over, the timer counts against its sender's limits.
	usualAttempt = 500 * time.Millisecond
	// refusedFor is how long the token of a sender who has left is answered with a refusal at `end`, instead of as an unknown token.
	refusedFor = 5 * time.Minute
	// retriedFor is the least time for which a request is remembered after its timer has ended. Dendrite remembers successful requests for
	// the same time.
	retriedFor = 30 * time.Minute
	// givenUpAfter is how many times in a row the roomserver may answer that it does not know an event. With pauses of lastPause that is
	// more than an hour, in which the roomserver processes what a crash has left in its queue.
	givenUpAfter = 125
	// lostAfter is the same limit for state that was set back. It is more than seven minutes; Dendrite redelivers what was in its queue at
	// a crash after five. It is short because a participant who has left a call should not be shown for longer than necessary.
	lostAfter = 20
	// unsentFactor is the factor by which a user may exceed the limit of running timers with unsent events: those that the roomserver has
	// failed to take, or does not know.
	unsentFactor = 10
)

// Timers is the engine. The package comment says what it guarantees.
type Timers struct {
	cfg        Config
	store      Store
	roomserver Roomserver
	tokens     *Tokens
	metrics    *metrics
	log        *logrus.Entry
	clock      clock

	reads     *batch.Batches[int64, *Timer]
	refreshes *batch.Batches[Refresh, bool]
	claims    *batch.Batches[ConditionalClaim, bool]
	drops     *batch.Batches[int64, struct{}]
	deletes   *batch.Batches[int64, struct{}]
	doubts    *batch.Batches[int64, struct{}]

	attempting *keylock.Locks[int64]  // by the timers' NIDs
	states     *keylock.Locks[uint64] // by the hashes of the pieces of state
	requests   *keylock.Locks[RequestHash]
	rows       *keylock.Locks[int64] // by the timers' NIDs
	lanes      *lanes.Lanes

	wakeup  chan struct{} // has capacity 1; signals that the first wake has come nearer
	ctx     context.Context
	stop    context.CancelFunc
	watcher sync.WaitGroup // the goroutines of Start, and those that delete rows; Stop waits for them after the lanes

	mu         sync.Mutex // guards the fields below
	index      *index.Index
	lastAnswer time.Duration // when the roomserver last finished an event; 0 before the first
	// heldStates contains the pieces of state whose locks are held by attempts.
	heldStates map[uint64]struct{}
	swept      []*index.Timer      // closed events whose rows sweep deletes; sweep is scheduled unless this is empty
	forgotAt   time.Duration       // when ForgetRequests was last called
	inFlight   map[string]inFlight // delayed events that are claimed and not finalised, by event ID
	// senders has the hashes of the users who have finalised events that were sent, and the round of readSenders that saw each last.
	senders map[uint64]int
	round   int
	due     map[uint64]Bucket // the state of DueLimit by the hashes of users; prune removes what is full again
}

// New returns an engine. It does nothing before Start.
func New(cfg Config, store Store, roomserver Roomserver, tokens *Tokens) *Timers {
	t := &Timers{
		cfg: cfg, store: store, roomserver: roomserver, tokens: tokens,
		log:        logrus.WithField("component", "expiration"),
		clock:      newClock(),
		reads:      batch.New(store.Read),
		refreshes:  batch.New(store.Refresh),
		claims:     batch.New(store.Claim),
		drops:      batch.New(batch.WithoutAnswers(store.Drop)),
		deletes:    batch.New(batch.WithoutAnswers(store.Delete)),
		doubts:     batch.New(batch.WithoutAnswers(store.Doubt)),
		attempting: keylock.New[int64](),
		states:     keylock.New[uint64](),
		requests:   keylock.New[RequestHash](),
		rows:       keylock.New[int64](),
		wakeup:     make(chan struct{}, 1),
		index:      index.New(),
		heldStates: map[uint64]struct{}{},
		inFlight:   map[string]inFlight{},
		senders:    map[uint64]int{},
		due:        map[uint64]Bucket{},
		lanes:      lanes.New(lanes.EarlyEvery),
	}
	count := func() (expiring, delayed int) {
		t.mu.Lock()
		defer t.mu.Unlock()
		return t.index.Len()
	}
	t.metrics = newMetrics(
		func() float64 { expiring, _ := count(); return float64(expiring) },
		func() float64 { _, delayed := count(); return float64(delayed) },
	)
	return t
}

// Collectors returns the engine's metrics, to be registered once.
func (t *Timers) Collectors() []prometheus.Collector { return t.metrics.collectors() }

// Start loads the timers, finishes what an earlier process claimed, and watches the deadlines until Stop is called or ctx is done. It must
// return before events are sent or tokens are used.
func (t *Timers) Start(ctx context.Context) error {
	inherited, err := t.loadAll(ctx)
	if err != nil {
		return fmt.Errorf("loading the timers: %w", err)
	}
	failpoint.Pass(failpoint.AfterLoad)
	t.run(ctx, inherited)
	return nil
}

// inherited is what an earlier process left unfinished.
type inherited struct {
	claimed []*index.Timer
	// doubted are the timers of state events that may have been replaced.
	doubted []*index.Timer
}

// run is Start after loading.
func (t *Timers) run(ctx context.Context, u inherited) {
	t.ctx, t.stop = context.WithCancel(ctx)
	for _, tm := range u.doubted {
		t.supersede(tm)
	}
	t.finishClaimed(u.claimed)
	t.watcher.Go(func() { guard.KeepGoing(t.ctx, "watching the deadlines", t.watch) })
	t.watcher.Go(func() { guard.KeepGoing(t.ctx, "pruning", t.prune) })
	t.mu.Lock()
	expiring, delayed := t.index.Len()
	t.mu.Unlock()
	if expiring+delayed >= manyTimers {
		t.watcher.Go(debug.FreeOSMemory) // what loading took and the index does not; the server need not wait for that
	}
}

// Stop waits for attempts in progress. After stopPatience, or when the context of Start ends, it cancels them. A write that the database has
// begun is waited for, up to batch.Timeout. Then all goroutines have ended. The next Start takes up the rest. Stop may be called more than
// once.
func (t *Timers) Stop() {
	if t.stop == nil {
		return
	}
	t.lanes.Stop()
	impatient := time.AfterFunc(stopPatience, t.stop)
	defer impatient.Stop()
	t.lanes.Wait()
	t.stop()
	t.watcher.Wait()
}

// Ping returns an error if the engine cannot use its database.
func (t *Timers) Ping(ctx context.Context) error { return t.store.Ping(ctx) }

// Token returns the refresh token of an event, whether the event has a timer or not.
func (t *Timers) Token(eventID string) string { return t.tokens.Token(eventID) }

// find returns the timer of a token or a delay ID, or nil.
func (t *Timers) find(h TokenHash, delayed bool) *index.Timer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byTokenWithMu(h, delayed)
}

// byTokenWithMu is find under Timers.mu.
func (t *Timers) byTokenWithMu(h TokenHash, delayed bool) *index.Timer {
	return t.index.ByToken(tokenOf(h), delayed)
}

// tokenOf returns the part of a token's hash that memory keeps.
func tokenOf(h TokenHash) [index.TokenSize]byte { return [index.TokenSize]byte(h[:]) }

// ofEvent returns the timer of an event, or nil. It looks for the event's token.
func (t *Timers) ofEvent(eventID string) *index.Timer {
	return t.find(HashToken(t.tokens.Token(eventID)), false)
}

// Running reports whether an event of this sender has a running timer.
func (t *Timers) Running(eventID, sender string) bool {
	tm, number := t.ofEvent(eventID), t.tokens.names.hash(sender)
	t.mu.Lock()
	defer t.mu.Unlock()
	return tm.Running() && tm.Sender() == number
}

func (t *Timers) isRunning(tm *index.Timer) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return tm.Running()
}

// noteConfirmed notes that an event is in its room.
func (t *Timers) noteConfirmed(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm.Presence, tm.Awaited = index.Confirmed, 0
}

// halfClosed returns the timers of a piece of state that are claimed and not closed, except for those that the roomserver does not answer.
func (t *Timers) halfClosed(state uint64) (timers []*index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.OfState(state, func(tm *index.Timer) {
		if tm.Phase() == index.Claimed && !tm.Unanswered {
			timers = append(timers, tm)
		}
	})
	return timers
}

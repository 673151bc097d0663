package expiration

import (
	"context"
	"encoding/json"
	"fmt"
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

// Config is what the component itself can be told; see docs/configuration.md.
type Config struct {
	// MaxRunningPerUser is how many timers one user may have running.
	MaxRunningPerUser int
	// MaxScheduledPerUser is how many delayed events one user may have scheduled.
	MaxScheduledPerUser int
	// KeepFinalised is for how long a delayed event can be looked up that was finalised, and MaxFinalisedPerUser for how many
	// of one user.
	KeepFinalised       time.Duration
	MaxFinalisedPerUser int
	// RestartGrace is how long after Start every timer runs at least, so that live clients can refresh first. 0: timers
	// that ran out while the server was down fire at once.
	RestartGrace time.Duration
	// TokenLimit limits the requests with one token, or one delay ID.
	TokenLimit RateLimit
	// Explain returns what the owner of a delayed event is shown that ended with an error: a *DropError or what is wrapped in one.
	// The engine stores it and does not read it.
	Explain func(error) json.RawMessage
}

const (
	// pollInterval is how long a lost wake-up can delay anything.
	pollInterval = 5 * time.Second
	// sweepPause is how long the rows of closed events are gathered before they are deleted: so that when many timers run out at
	// once, this work comes after the claims. A crash meanwhile brings their closing events to the roomserver again.
	sweepPause = time.Second
	// lookAgainAfter is how long after something was told of a piece of state it is looked at once more.
	lookAgainAfter = time.Second
	// recoverTimeout is how long Start waits for what an earlier process claimed and did not finish.
	recoverTimeout = 10 * time.Second
	// stopPatience is how long Stop waits for the closings that are under way.
	stopPatience = 5 * time.Second
	// firstPause is the pause after the first failed attempt; it doubles with each further one up to lastPause.
	firstPause = 500 * time.Millisecond
	lastPause  = 30 * time.Second
	// manyTimers is from how many timers on their loading leaves memory behind that is worth giving back.
	manyTimers = 10_000
	// loadingGCPercent is by how much the heap may grow between two collections while timers are loaded.
	loadingGCPercent = 400
	// maxFailures is as far as failures are counted.
	maxFailures = 16
	// refusedFor is how long the token of a sender who is gone is told so at /end, before it is a token like any unknown
	// one.
	refusedFor = 5 * time.Minute
	// retriedFor is how long at least a request is known whose timer is gone; Dendrite itself knows those that went well for
	// as long.
	retriedFor = 30 * time.Minute
	// givenUpAfter is how many times in a row the roomserver can say that it does not know an event. With lastPause between them
	// it is more than an hour, in which the roomserver's queue brings what a crash has left in it.
	givenUpAfter = 125
	// lostAfter is the same for state that was set back behind an event. It is more than seven minutes: Dendrite's queue brings what a
	// crash has left in it after five. Who is gone from a call is not to be seen there for longer than need be.
	lostAfter = 20
	// unsentFactor times as many timers as may be running can a user have whose events the roomserver has failed to take, or
	// does not know.
	unsentFactor = 10
)

// Timers is the component. See the package comment for what it guarantees.
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

	closings *keylock.Locks[int64]  // by the timers' NIDs
	states   *keylock.Locks[uint64] // by the hashes of the pieces of state
	requests *keylock.Locks[RequestHash]
	rows     *keylock.Locks[int64] // by the timers' NIDs
	lanes    *lanes.Lanes

	wakeup  chan struct{} // of capacity 1: the first wake has come nearer
	ctx     context.Context
	stop    context.CancelFunc
	watcher sync.WaitGroup // started by Start, ended by Stop after the lanes' turns; and what these leave to be done behind them

	mu         sync.Mutex // guards what follows
	index      *index.Index
	lastAnswer time.Duration // when the roomserver was done last with an event that it was given; 0 at first
	// attempts has the pieces of state whose locks attempts have.
	attempts map[uint64]struct{}
	swept    []*index.Timer      // closed events whose rows sweep deletes; if there are any, it is on its way
	forgotAt time.Duration       // when requests were forgotten last
	inFlight map[string]inFlight // the delayed events that are claimed and not finalised, by the IDs of the events
	senders  map[uint64]struct{} // the hashes of the users with finalised events that were sent
}

// New returns the component. It does nothing before Start.
func New(cfg Config, store Store, roomserver Roomserver, tokens *Tokens) *Timers {
	t := &Timers{
		cfg: cfg, store: store, roomserver: roomserver, tokens: tokens,
		log:       logrus.WithField("component", "expiration"),
		clock:     newClock(),
		reads:     batch.New(store.Read),
		refreshes: batch.New(store.Refresh),
		claims:    batch.New(store.Claim),
		drops:     batch.New(batch.WithoutAnswers(store.Drop)),
		deletes:   batch.New(batch.WithoutAnswers(store.Delete)),
		doubts:    batch.New(batch.WithoutAnswers(store.Doubt)),
		closings:  keylock.New[int64](),
		states:    keylock.New[uint64](),
		requests:  keylock.New[RequestHash](),
		rows:      keylock.New[int64](),
		wakeup:    make(chan struct{}, 1),
		index:     index.New(),
		attempts:  map[uint64]struct{}{},
		inFlight:  map[string]inFlight{},
		senders:   map[uint64]struct{}{},
		lanes:     lanes.New(lanes.EarlyEvery),
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

// Collectors returns the component's metrics, to be registered once.
func (t *Timers) Collectors() []prometheus.Collector { return t.metrics.collectors() }

// Start loads the timers, finishes what an earlier process had claimed, and starts to watch the deadlines, until Stop is
// called or ctx is done. It must return before events are sent or tokens used.
func (t *Timers) Start(ctx context.Context) error {
	inherited, err := t.loadAll(ctx)
	if err != nil {
		return fmt.Errorf("loading the timers of expiring events: %w", err)
	}
	failpoint.Pass(failpoint.AfterLoad)
	t.run(ctx, inherited)
	return nil
}

// inherited is what an earlier process had begun with timers.
type inherited struct {
	claimed []*index.Timer
	// doubted are those of state events that may have been replaced.
	doubted []*index.Timer
}

// run is Start when everything is loaded.
func (t *Timers) run(ctx context.Context, u inherited) {
	t.ctx, t.stop = context.WithCancel(ctx)
	for _, tm := range u.doubted {
		t.supersede(tm)
	}
	t.finishClaimed(u.claimed)
	t.watcher.Go(func() { guard.KeepGoing(t.ctx, "watching the deadlines", t.watch) })
	t.watcher.Go(func() { guard.KeepGoing(t.ctx, "pruning", t.prune) })
}

// Stop lets the closings that are under way come to their end, within stopPatience and while the context of Start lasts,
// and ends all goroutines. What is left is taken up by the next Start. Stop may be called more than once.
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

// Ping reports whether the component can reach its database.
func (t *Timers) Ping(ctx context.Context) error { return t.store.Ping(ctx) }

// Token returns the refresh token of an event, running or not.
func (t *Timers) Token(eventID string) string { return t.tokens.Token(eventID) }

// find returns the timer of a token, or of a delay ID.
func (t *Timers) find(h TokenHash, delayed bool) *index.Timer {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.byTokenWithMu(h, delayed)
}

// byToken is find under Timers.mu.
func (t *Timers) byTokenWithMu(h TokenHash, delayed bool) *index.Timer {
	return t.index.ByToken(tokenOf(h), delayed)
}

// tokenOf returns what memory keeps of a token's hash.
func tokenOf(h TokenHash) [index.TokenSize]byte { return [index.TokenSize]byte(h[:]) }

// ofEvent returns the timer of an event, running or not: the event's token says which.
func (t *Timers) ofEvent(eventID string) *index.Timer {
	return t.find(HashToken(t.tokens.Token(eventID)), false)
}

// Running reports whether there is a running timer for an event of this sender.
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

// confirmed notes that an event is in its room.
func (t *Timers) noteConfirmed(tm *index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tm.Presence, tm.Awaited = index.Confirmed, 0
}

// inherited returns the timers of a piece of state that are claimed and not closed, but for those that the roomserver does not answer.
func (t *Timers) halfClosed(state uint64) (timers []*index.Timer) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.index.OfState(state, func(tm *index.Timer) {
		if tm.Phase() == index.Claimed && tm.Unanswered == 0 {
			timers = append(timers, tm)
		}
	})
	return timers
}

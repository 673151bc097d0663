//go:build all

package integration

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// actor is a client that makes random requests in a room of its own, one after the other, and records them in the ledger. After a failure
// of the server, it repeats the request that had no answer, as real clients do.
type actor struct {
	*user
	ledger     *ledger
	roomID     string
	random     *rand.Rand
	entries    []*entry
	live       []*entry // events whose tokens the server should accept
	unanswered *entry   // the event whose send had no answer
	answers    map[int]int

	delays      []*delayedEntry
	scheduled   []*delayedEntry // events that the actor still acts on
	unscheduled *delayedEntry   // the event whose scheduling had no answer
}

const (
	// actorLimit limits how many expiring events an actor acts on at the same time.
	actorLimit = 12
	// actorKeys is how many state keys an actor uses.
	actorKeys = 4
)

// actorPatience limits how long an actor waits for an answer.
var actorPatience = patience.For(30 * time.Second)

func stateKey(n int) string { return fmt.Sprint("key", n) }

// noAnswer is the status of a request without an answer.
const noAnswer = 0

// errNoAnswer says that the server is down, or that it answered with an error of its own.
var errNoAnswer = errors.New("no answer")

// newActor makes a user with a room of its own.
func (l *ledger) newActor(t *testing.T, s *server, seed uint64) {
	t.Helper()
	u := s.newUser(t)
	l.actors = append(l.actors, &actor{
		user: u, ledger: l, roomID: s.room(t, u), answers: map[int]int{},
		random: rand.New(rand.NewPCG(seed, uint64(len(l.actors)))),
	})
}

// act makes requests until the context ends, or a request has no answer.
func (a *actor) act(ctx context.Context) {
	for ctx.Err() == nil && a.step(ctx) == nil {
	}
}

// actOn is act for a server that goes down and comes back.
func (a *actor) actOn(ctx context.Context) {
	for ctx.Err() == nil {
		a.act(ctx)
		_ = a.pause(ctx)
	}
}

// step makes one request.
func (a *actor) step(ctx context.Context) error {
	if a.unanswered != nil {
		return a.send(ctx, a.unanswered)
	}
	if a.unscheduled != nil || a.random.IntN(3) == 0 {
		return a.stepDelayed(ctx)
	}
	choice := a.random.IntN(10)
	if len(a.live) == 0 || choice < 5 && len(a.live) < actorLimit {
		return a.send(ctx, a.newEntry(choice < 2, choice < 4))
	}
	// Half of the events are left to expire.
	e := a.live[a.random.IntN(len(a.live))]
	switch {
	case e.n%2 == 0 || e.dead && choice < 9:
		return a.pause(ctx)
	case choice < 9:
		return a.refresh(ctx, e)
	default:
		return a.end(ctx, e)
	}
}

// pause waits a moment, so that other actors can act.
func (a *actor) pause(ctx context.Context) error {
	a.forget()
	select {
	case <-ctx.Done():
	case <-time.After(time.Duration(a.random.IntN(20)) * time.Millisecond):
	}
	return nil
}

// newEntry makes a random event: a message or state. A message always expires, state may be plain.
func (a *actor) newEntry(message, expiring bool) *entry {
	e := &entry{n: len(a.entries), body: JSON{"n": len(a.entries)}}
	if message || expiring {
		e.life = time.Duration(1+a.random.IntN(3)) * time.Second
		e.body["m.will_expire"] = int(e.life.Seconds())
	}
	if message {
		e.path = homeserver.SendPath(a.roomID, "m.room.message")
	} else {
		e.key = stateKey(a.random.IntN(actorKeys))
		e.path = homeserver.StatePath(a.roomID, memberType, e.key)
	}
	e.earliest = time.Now().Add(e.life)
	a.entries = append(a.entries, e)
	return e
}

// send sends an event, for the first time or again.
func (a *actor) send(ctx context.Context, e *entry) error {
	e.retried = a.unanswered == e
	a.unanswered = e
	var replaced []*entry
	for _, other := range a.live {
		if e.key != "" && other.key == e.key {
			other.uncertain, other.touched = true, time.Now()
			replaced = append(replaced, other)
		}
	}
	res, err := a.request(ctx, http.MethodPut, e.path, e.body)
	if err != nil {
		return err
	}
	a.unanswered = nil
	if res.Code != http.StatusOK {
		a.ledger.fault("send: %s", res)
		return nil
	}
	a.s.remember(res)
	e.eventID, e.token, e.touched = res.Get("event_id").Str, res.Get("expire_refresh_token").Str, time.Now()
	for _, other := range replaced {
		if other.eventID != e.eventID {
			other.replaced, other.dead = true, true
		}
	}
	if e.token != "" {
		a.live = append(a.live, e)
	}
	a.forget()
	return nil
}

func (a *actor) refresh(ctx context.Context, e *entry) error {
	asked := time.Now()
	e.touched = asked
	res, err := a.request(ctx, http.MethodPut, keepAlivePath+"refresh", JSON{"expire_refresh_token": e.token})
	if err != nil {
		return err
	}
	a.answered(e, "refresh", res, e.uncertain)
	if res.Code == http.StatusOK {
		e.earliest = asked.Add(e.life)
	}
	return nil
}

func (a *actor) end(ctx context.Context, e *entry) error {
	e.touched = time.Now()
	before := e.uncertain
	e.uncertain = true
	res, err := a.request(ctx, http.MethodPut, keepAlivePath+"end", JSON{"expire_refresh_token": e.token})
	if err != nil {
		e.ending = true
		return err
	}
	a.answered(e, "end", res, before)
	if res.Code == http.StatusOK {
		e.ended, e.dead = true, true
	}
	return nil
}

// answered checks the answer to a keep-alive. The answer may be a refusal if the event may have been replaced or ended before.
func (a *actor) answered(e *entry, method string, res homeserver.Response, uncertain bool) {
	switch {
	case res.Code == http.StatusOK && e.dead && !(method == "end" && e.ending && !e.ended):
		a.ledger.fault("%s of %s was accepted after it was over", method, e.eventID)
	case res.Code == http.StatusNotFound:
		if !uncertain && !e.dead && time.Now().Before(e.earliest) {
			a.ledger.fault("%s of %s was refused while it must be running", method, e.eventID)
		}
		e.dead = true
	case res.Code != http.StatusOK:
		a.ledger.fault("%s: %s", method, res)
	}
}

// forget removes events some time after their last request. Until then the actor checks that an invalid token stays invalid.
func (a *actor) forget() {
	now := time.Now()
	a.live = slices.DeleteFunc(a.live, func(e *entry) bool { return now.Sub(e.touched) > 5*time.Second && now.After(e.earliest) })
}

// request makes one request. A status of 500 or more counts as no answer.
func (a *actor) request(ctx context.Context, method, path string, body JSON) (homeserver.Response, error) {
	ctx, cancel := context.WithTimeout(ctx, actorPatience)
	defer cancel()
	client := a.Client
	if strings.HasPrefix(path, keepAlivePath) || strings.HasPrefix(path, unstableDelayed) {
		client = a.s.Anonymous()
	}
	res, err := client.Do(ctx, method, path, body)
	if err != nil {
		a.answers[noAnswer]++
		return res, errNoAnswer
	}
	a.answers[res.Code]++
	if res.Code >= 500 {
		return res, errNoAnswer
	}
	return res, nil
}

// settle waits until all timers are gone, except those of events that never reached their rooms.
func (l *ledger) settle(t *testing.T, s *server) {
	t.Helper()
	answered := func(what string, ask func() error) {
		t.Helper()
		eventually(t, what, func() bool {
			s.revive(t) // the process may end some time after an outage
			return ask() == nil
		})
	}
	for _, a := range l.actors {
		if a.unanswered != nil {
			answered("the answer to a send", func() error { return a.send(t.Context(), a.unanswered) })
		}
		if a.unscheduled != nil {
			answered("the answer to a delayed send", func() error { return a.schedule(t.Context(), a.unscheduled) })
		}
	}
	var waiting []string
	defer func() {
		if t.Failed() {
			s.mentions(t, waiting)
		}
	}()
	eventuallyWithin(t, afterLost, "all timers have come to their end", func() bool {
		left := map[string]bool{}
		waiting = nil
		for _, row := range s.timers(t) {
			if row.Delayed != nil {
				waiting = append(waiting, row.Event.ID)
			}
			left[row.Event.ID] = true
		}
		if len(left) == 0 {
			return true
		}
		for _, e := range s.events(t) {
			if left[e.id] {
				waiting = append(waiting, e.id)
			}
		}
		return len(waiting) == 0
	})
}

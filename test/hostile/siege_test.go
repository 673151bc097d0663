//go:build all

package hostile

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// accounts is how many accounts attack at the same time, and manyRooms how many rooms the first of them has.
	accounts  = 10
	manyRooms = 70
	fewRooms  = 3
	// senders is how many requests of an account and an attack run at the same time.
	senders = 4
)

// siege is a server under attack, with the measurements.
type siege struct {
	s         *server
	bystander *bystander
	// neighbour sets one piece of state in a room that the attackers are in.
	neighbour *homeserver.Client
	shared    string
	attackers []*attacker
	table     []string
}

// attacker is a hostile account. Without a token it is a stranger.
type attacker struct {
	*homeserver.Client
	s      *siege
	rooms  []string
	pseudo string // a room with pseudo IDs
	n      atomic.Int64

	mu      sync.Mutex
	answers map[string]int
}

func newSiege(t *testing.T, db database) *siege {
	t.Helper()
	s := &siege{s: start(t, db, nil)}
	s.bystander = newBystander(t, s.s)
	s.neighbour = s.s.register(t, "neighbour", 1)[0]
	var err error
	s.shared, err = s.neighbour.CreateRoom(t.Context(), nil)
	require.NoError(t, err)
	var ready sync.WaitGroup
	atOnce := make(chan struct{}, 2)
	for i, c := range s.s.register(t, "attacker", accounts) {
		a := &attacker{Client: c, s: s, answers: map[string]int{}}
		s.attackers = append(s.attackers, a)
		ready.Go(func() {
			atOnce <- struct{}{}
			defer func() { <-atOnce }()
			a.prepare(t, map[bool]int{true: manyRooms, false: fewRooms}[i == 0])
		})
	}
	ready.Wait()
	return s
}

// prepare creates an attacker's rooms, and joins the shared one.
func (a *attacker) prepare(t *testing.T, rooms int) {
	for range rooms {
		room, err := a.CreateRoom(t.Context(), nil)
		if err != nil {
			t.Error(err)
			return
		}
		a.rooms = append(a.rooms, room)
	}
	var err error
	if a.pseudo, err = a.CreateRoom(t.Context(), JSON{"room_version": "org.matrix.msc4014"}); err != nil {
		t.Error(err)
	}
	if err = a.Join(t.Context(), a.s.shared); err != nil {
		t.Error(err)
	}
}

// do sends a request, and counts the answer.
func (a *attacker) do(ctx context.Context, method, path string, body any, header ...string) homeserver.Response {
	res, err := a.Do(ctx, method, path, body, header...)
	answer := fmt.Sprint(res.Code)
	if err != nil {
		if answer = "no answer"; ctx.Err() != nil {
			answer = "under way"
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answers[answer]++
	return res
}

// delay schedules an event, and returns its delay ID. It is a state event unless key is "-".
func (a *attacker) delay(ctx context.Context, room, eventType, key string, delay time.Duration, content any) string {
	path := homeserver.SendPath(room, eventType)
	if key != "-" {
		path = homeserver.StatePath(room, eventType, key)
	}
	return a.do(ctx, http.MethodPut, fmt.Sprintf("%s?org.matrix.msc4140.delay=%d", path, delay.Milliseconds()), content).Get("delay_id").Str
}

// act restarts, sends or cancels a delayed event.
func (a *attacker) act(ctx context.Context, id, action string) {
	a.do(ctx, http.MethodPost, stablePath+"/"+url.PathEscape(id)+"/"+action, JSON{})
}

// cleanUp cancels an attack's scheduled events, so that the next attack has the full limits and is not disturbed by events that are due.
// Without an answer the attacker knows no delay ID, so they are listed.
func (a *attacker) cleanUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for a.Token != "" && ctx.Err() == nil {
		res, err := a.Do(ctx, http.MethodGet, unstablePath, nil)
		if err != nil || res.Code != http.StatusOK { // the limit of look-ups is used up
			time.Sleep(200 * time.Millisecond)
			continue
		}
		scheduled := res.Get("delayed_events.#.delay_id").Array()
		if len(scheduled) == 0 {
			return
		}
		for _, id := range scheduled {
			_, _ = a.s.s.Anonymous().Do(ctx, http.MethodPost, unstablePath+"/"+id.Str+"/cancel", nil)
		}
	}
}

// nextRoom returns the attacker's rooms in turn.
func (a *attacker) nextRoom() string { return a.rooms[int(a.n.Add(1))%len(a.rooms)] }

// figuresOf are the measurements during an attack.
type figuresOf struct {
	figures
	neighbour           time.Duration // the slowest send of the shared state
	memory, grown, disk int64
	recovered           time.Duration // how long the bystander took to recover from the previous attack
}

// under runs attacks for a while and measures meanwhile.
func (s *siege) under(t *testing.T, name string, attackers []*attacker, attacks ...attack) {
	t.Helper()
	if !s.s.alive() {
		t.Fatalf("before %s: the process ended", name)
	}
	recovered, ok := s.bystander.recover()
	if !ok {
		t.Errorf("before %s: %s after the previous attack the bystander is still slowed down", name, recovered)
	}
	before, _ := memory(t, s.s.Pid())
	disk := s.s.timersSize(t)
	ctx, cancel := context.WithTimeout(t.Context(), *attackFlag)
	defer cancel()
	var running sync.WaitGroup
	for _, a := range attackers {
		for _, attack := range attacks {
			for range senders {
				running.Go(func() {
					for ctx.Err() == nil {
						attack.once(ctx, a)
					}
				})
			}
		}
	}
	var f figuresOf
	stop := make(chan struct{})
	var measuring sync.WaitGroup
	measuring.Go(func() { f.neighbour = s.setShared(t, stop) })
	measuring.Go(func() { f.memory = s.watchMemory(t, stop) })
	running.Wait()
	time.Sleep(lateness) // for the last events that are due
	close(stop)
	measuring.Wait()
	f.figures = s.bystander.phase()
	f.grown, f.disk = f.memory-before, s.s.timersSize(t)-disk
	f.recovered = recovered
	s.judge(t, name, len(attackers), f)
	for _, a := range attackers {
		a.cleanUp(t.Context())
	}
}

// setShared sets the shared state repeatedly, and returns the time of the slowest send.
func (s *siege) setShared(t *testing.T, stop chan struct{}) (slowest time.Duration) {
	for i := 0; ; i++ {
		before := time.Now()
		_, err := s.neighbour.Do(t.Context(), http.MethodPut, homeserver.StatePath(s.shared, "m.call.member", "shared"), JSON{"n": i})
		slowest = max(slowest, time.Since(before).Round(time.Millisecond))
		if err != nil && !s.s.alive() {
			return slowest
		}
		select {
		case <-stop:
			return slowest
		case <-time.After(probeInterval):
		}
	}
}

// watchMemory returns the greatest memory usage of the server.
func (s *siege) watchMemory(t *testing.T, stop chan struct{}) (most int64) {
	for s.s.alive() {
		now, _ := memory(t, s.s.Pid())
		most = max(most, now)
		select {
		case <-stop:
			return most
		case <-time.After(100 * time.Millisecond):
		}
	}
	return most
}

// answersOf returns a summary of the answers to attackers, and resets the counts.
func answersOf(attackers []*attacker) string {
	sum := map[string]int{}
	for _, a := range attackers {
		a.mu.Lock()
		for answer, n := range a.answers {
			sum[answer] += n
		}
		a.answers = map[string]int{}
		a.mu.Unlock()
	}
	var all []string
	for _, answer := range slices.Sorted(maps.Keys(sum)) {
		all = append(all, fmt.Sprintf("%d × %s", sum[answer], answer))
	}
	return strings.Join(all, ", ")
}

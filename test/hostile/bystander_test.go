//go:build all

package hostile

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// lateness is how late a bystander's event may come into its room, whatever hostile users do. Somebody else sees it when Dendrite's
	// sync API has got so far: with ten accounts that send what they like, it is seconds behind all sends, and so it is in stock Dendrite.
	lateness = 2 * time.Second
	// probeInterval is the time between two of a bystander's sends.
	probeInterval  = 500 * time.Millisecond
	bystanderRooms = 4
	// coming is how long after a restart what is due may be late.
	coming = 5 * time.Second
	// lost is when an event that was not seen will not be.
	lost = 60 * time.Second
)

// bystander is a user who has timers of his own, and an observer in the same room who sees when they are dealt with.
type bystander struct {
	s                *server
	sender, observer *homeserver.Client
	// rooms are several: the events of one room are closed one after the other.
	rooms []string

	mu sync.Mutex
	// waited are the deadlines of what was accepted and not yet seen, by event ID, or by body for a delayed event.
	waited map[string]time.Time
	// answered is when a send was answered whose event was not yet seen, by event ID: how far /sync is behind.
	answered map[string]time.Time
	// overdue are those that a phase has counted already.
	overdue map[string]time.Time
	// due are the deadlines of what may not be in its room yet, by the IDs under which the server logs it.
	due map[string]time.Time
	// late, seen and sends are what was measured in this phase: when events came into their rooms, and when they were seen.
	late, seen, sends, behind []time.Duration
	refused                   map[string]int
	sent                      int
	restarted                 time.Time
	slow                      []string         // what was later than allowed
	logs                      map[string]int64 // how far the server's logs were read, by file
	inRoom                    map[string]time.Time
}

// newBystander registers both users, and lets them act until the test ends.
func newBystander(t *testing.T, s *server) *bystander {
	t.Helper()
	users := s.register(t, "bystander", 2)
	s.measure(t, users[0])
	b := &bystander{s: s, sender: users[0], observer: users[1], waited: map[string]time.Time{}, answered: map[string]time.Time{}, due: map[string]time.Time{}, logs: map[string]int64{}, inRoom: map[string]time.Time{}, overdue: map[string]time.Time{}, refused: map[string]int{}}
	for range bystanderRooms {
		room, err := b.sender.CreateRoom(t.Context(), nil)
		require.NoError(t, err)
		require.NoError(t, b.observer.Join(t.Context(), room))
		b.rooms = append(b.rooms, room)
	}
	since := b.sync(t.Context(), "", 0)
	require.NotEmpty(t, since)
	var running sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	running.Go(func() {
		for ctx.Err() == nil {
			if next := b.sync(ctx, since, 2*time.Second); next != "" {
				since = next
			} else {
				time.Sleep(20 * time.Millisecond) // the server is down
			}
		}
	})
	running.Go(func() {
		for ctx.Err() == nil {
			running.Go(func() { b.probe(ctx) })
			time.Sleep(probeInterval)
		}
	})
	t.Cleanup(func() {
		cancel()
		running.Wait()
	})
	return b
}

// probe sends an expiring event or a delayed one, and remembers when it must be closed or sent.
func (b *bystander) probe(ctx context.Context) {
	b.mu.Lock()
	b.sent++
	n := b.sent
	b.mu.Unlock()
	body := fmt.Sprintf("probe %d", n)
	room := b.rooms[n%bystanderRooms]
	after, path, content := time.Second, homeserver.SendPath(room, "m.room.message"), JSON{"body": body, "msgtype": "m.text"}
	switch n % 3 {
	case 0:
		content["m.will_expire"] = 1
	case 1:
		content["m.will_expire"] = 1
		path = homeserver.StatePath(room, "m.call.member", fmt.Sprintf("key%d", n%64))
	default:
		path += "?org.matrix.msc4140.delay=" + strconv.FormatInt(after.Milliseconds(), 10)
	}
	before, restarts := time.Now(), b.s.restarts.Load()
	res, err := b.sender.Do(ctx, http.MethodPut, path, content)
	now := time.Now()
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case ctx.Err() != nil || err != nil && (restarts != b.s.restarts.Load() || restarts%2 == 1):
		return
	case err != nil:
		b.refused["no answer"]++
	case res.Code != http.StatusOK:
		b.refused[fmt.Sprintf("%.200s", res)]++
	case n%3 == 2:
		b.waited[body] = now.Add(after)
	default:
		b.waited[res.Get("event_id").Str] = now.Add(after)
		b.answered[res.Get("event_id").Str] = now
		b.due[res.Get("event_id").Str] = now.Add(after)
	}
	b.sends = append(b.sends, now.Sub(before))
}

// sync reads the observer's /sync once, and returns where to go on, or "" if there was no answer.
func (b *bystander) sync(ctx context.Context, since string, timeout time.Duration) string {
	// A timeline with a gap would hide what came in it.
	path := fmt.Sprintf("/_matrix/client/v3/sync?since=%s&timeout=%d&filter=%s",
		url.QueryEscape(since), timeout.Milliseconds(), url.QueryEscape(`{"room":{"timeline":{"limit":1000}}}`))
	res, err := b.observer.Do(ctx, http.MethodGet, path, nil)
	if err != nil || res.Code != http.StatusOK {
		if ctx.Err() == nil && b.s.restarts.Load()%2 == 0 {
			b.mu.Lock()
			b.refused[fmt.Sprintf("/sync: %.200s %v", res, err)]++
			b.mu.Unlock()
		}
		return ""
	}
	now := time.Now()
	res.Get("rooms.join").ForEach(func(_, room gjson.Result) bool {
		for _, part := range []string{"state.events", "timeline.events"} {
			for _, e := range room.Get(part).Array() {
				b.see(e, now)
			}
		}
		return true
	})
	return res.Get("next_batch").Str
}

// see notes that an event has come, if it is one that is waited for.
func (b *bystander) see(e gjson.Result, now time.Time) {
	id := e.Get(`content.m\.relates_to.event_id`).Str
	if id == "" && !e.Get(`content.m\.will_expire`).Exists() {
		id = e.Get("content.body").Str
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if answered, ok := b.answered[e.Get("event_id").Str]; ok {
		b.behind = append(b.behind, max(now.Sub(answered), 0))
		delete(b.answered, e.Get("event_id").Str)
	}
	if deadline, ok := b.waited[id]; ok {
		b.seen = append(b.seen, now.Sub(deadline))
		delete(b.waited, id)
		if !e.Get(`content.m\.relates_to`).Exists() { // a delayed event, whose ID is known only now
			b.due[e.Get("event_id").Str] = deadline
		}
	}
	delete(b.overdue, id)
}

func (b *bystander) note(deadline, now time.Time) {
	late := now.Sub(deadline)
	if deadline.Before(b.restarted.Add(coming)) {
		return
	}
	b.late = append(b.late, late)
	if late > lateness && len(b.slow) < 3 {
		b.slow = append(b.slow, fmt.Sprintf("due %s, in the room %s later", deadline.Format("15:04:05.000"), late.Round(time.Millisecond)))
	}
}

// logged is a line that the server logs when a closing event, or a delayed one, is in its room.
var logged = regexp.MustCompile(`(?m)^time="([^"]+)" level=info msg="(?:Closed an expiring|Sent a delayed) event".* event_id="(\$[^"]+)"`)

// done reads in the server's logs which of the events that are due are in their rooms. bystander.mu is held.
func (b *bystander) done() {
	names, _ := filepath.Glob(filepath.Join(b.s.Dir, "log", "*"))
	for _, name := range names {
		file, err := os.Open(name)
		if err != nil {
			continue
		}
		_, _ = file.Seek(b.logs[name], io.SeekStart)
		text, _ := io.ReadAll(file)
		_ = file.Close()
		text = text[:bytes.LastIndexByte(text, '\n')+1]
		b.logs[name] += int64(len(text))
		for _, line := range logged.FindAllSubmatch(text, -1) {
			if at, err := time.Parse(time.RFC3339Nano, string(line[1])); err == nil {
				b.inRoom[string(line[2])] = at
			}
		}
	}
	for eventID, deadline := range b.due {
		if at, ok := b.inRoom[eventID]; ok {
			b.note(deadline, at)
			delete(b.due, eventID)
		}
	}
}

// disturb says that the server was restarted just now.
func (b *bystander) disturb() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.restarted = time.Now()
}

// figures are what a bystander has seen during a phase.
type figures struct {
	count, overdue         int
	median, p99, max       time.Duration // of the lateness
	seen                   time.Duration // p99 of how late somebody else saw it
	sendMedian, sendLatest time.Duration
	behind                 time.Duration // p99 of how far /sync was behind the sends
	refused                map[string]int
	slow                   []string
}

// phase ends a phase: what is overdue at the moment counts as it is.
func (b *bystander) phase() (f figures) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done()
	now := time.Now()
	for id, deadline := range b.due {
		if deadline.Add(lateness).Before(now) {
			f.overdue++
			b.note(deadline, now)
			delete(b.due, id)
		}
	}
	for id, deadline := range b.waited {
		if deadline.Add(lateness).Before(now) {
			delete(b.waited, id)
			b.overdue[id] = deadline
		}
	}
	f.count, f.median, f.p99, f.max = len(b.late), quantile(b.late, .5), quantile(b.late, .99), quantile(b.late, 1)
	f.sendMedian, f.sendLatest = quantile(b.sends, .5), quantile(b.sends, 1)
	f.seen, f.behind = quantile(b.seen, .99), quantile(b.behind, .99)
	f.refused, f.slow = b.refused, b.slow
	b.late, b.seen, b.sends, b.behind, b.refused, b.slow = nil, nil, nil, nil, map[string]int{}, nil
	return f
}

// missing returns how many events are overdue for so long.
func (b *bystander) missing(by time.Duration) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, of := range []map[string]time.Time{b.waited, b.overdue} {
		for _, deadline := range of {
			if time.Since(deadline) > by {
				n++
			}
		}
	}
	return n
}

// recover waits, not for ever, until nothing of the bystander's is overdue, and begins a phase.
func (b *bystander) recover() (took time.Duration) {
	begun := time.Now()
	for b.missing(lateness) > 0 && time.Since(begun) < lost {
		time.Sleep(100 * time.Millisecond)
	}
	b.phase()
	return time.Since(begun).Round(100 * time.Millisecond)
}

// quantile returns a quantile of durations, 0 if there are none.
func quantile(of []time.Duration, q float64) time.Duration {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[int(q*float64(len(sorted)-1)+.5)].Round(time.Millisecond)
}

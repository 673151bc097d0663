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
	// lateness limits how late a bystander's event may reach its room, whatever hostile users do. Another user sees the event later, when
	// Dendrite's sync API has processed it. With ten accounts that send without limits, the sync API is seconds behind, as in stock Dendrite.
	lateness = 2 * time.Second
	// probeInterval is the time between two sends of a bystander.
	probeInterval  = 500 * time.Millisecond
	bystanderRooms = 4
	// coming is the time after a restart in which late events do not count.
	coming = 5 * time.Second
	// calm limits lateness and sends on the usual machine while nobody attacks.
	calm = 250 * time.Millisecond
	// lost is the time after which a missing event counts as lost.
	lost = 60 * time.Second
)

// bystander is a user with timers, and an observer in the same rooms who sees the closing events and the delayed events.
type bystander struct {
	s                *server
	sender, observer *homeserver.Client
	// rooms are several rooms, because the events of one room are closed one after the other.
	rooms []string

	mu sync.Mutex
	// waited are the deadlines of accepted events that the observer has not seen. The key is the event ID, or the body of a delayed event.
	waited map[string]time.Time
	// answered are the times of the answers to sends whose events the observer has not seen, by event ID. They show how far /sync is behind.
	answered map[string]time.Time
	// overdue are the deadlines of events that an earlier phase has counted as overdue.
	overdue map[string]time.Time
	// due are the deadlines of events that may not be in their rooms yet. The keys are the event IDs in the server's log.
	due map[string]time.Time
	// These are the measurements of a phase. late is when events reached their rooms, and seen when the observer saw them, after their
	// deadlines.
	late, seen, sends, behind []time.Duration
	refused                   map[string]int
	sent                      int
	restarted                 time.Time
	slow                      []string         // events that were too late
	logs                      map[string]int64 // how far the server's logs have been read, by file
	inRoom                    map[string]time.Time
}

// newBystander registers both users, and makes them act until the test ends.
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

// probe sends an expiring or a delayed event, and records its deadline.
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
	case ctx.Err() != nil, (err != nil || res.Code >= http.StatusInternalServerError) && (restarts != b.s.restarts.Load() || restarts%2 == 1):
		return // the server is down, or stops
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

// sync makes one /sync request for the observer. It returns the next batch token, or "" if there was no answer.
func (b *bystander) sync(ctx context.Context, since string, timeout time.Duration) string {
	// The limit is high, because a gap in the timeline would hide events.
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

// see records that the observer has seen an event, if the event is one of the bystander's.
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
		if !e.Get(`content.m\.relates_to`).Exists() { // a delayed event, whose ID was unknown until now
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

// logged matches the line that the server logs when a closing event, or a delayed event, is in its room.
var logged = regexp.MustCompile(`(?m)^time="([^"]+)" level=info msg="(?:Closed an expiring|Sent a delayed) event".* event_id="(\$[^"]+)"`)

// done reads the server's logs and records which due events are in their rooms. The caller holds bystander.mu.
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

// disturb records that the server was just restarted.
func (b *bystander) disturb() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.restarted = time.Now()
}

// figures are a bystander's measurements of a phase.
type figures struct {
	count, overdue         int
	median, p99, max       time.Duration // of the lateness
	seen                   time.Duration // p99 of how late the observer saw it
	sendMedian, sendLatest time.Duration
	behind                 time.Duration // p99 of how far /sync was behind the sends
	refused                map[string]int
	slow                   []string
}

// phase ends a phase and returns its figures. Events that are overdue at this moment count with their lateness so far.
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

// missing returns how many events are overdue by more than the given time.
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

// lostEvents describes the events that the observer has not seen for so long that they count as lost.
func (b *bystander) lostEvents() (lostOnes []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.done()
	for _, of := range []map[string]time.Time{b.waited, b.overdue} {
		for id, deadline := range of {
			if time.Since(deadline) > lost {
				at := "never in its room, by the log"
				if logged, ok := b.inRoom[id]; ok {
					at = "in its room at " + logged.Format("15:04:05.000")
				}
				lostOnes = append(lostOnes, fmt.Sprintf("%s, due %s, %s", id, deadline.Format("15:04:05.000"), at))
			}
		}
	}
	return lostOnes
}

// recover waits until an attack has no effect any more, and then begins a phase. It gives up after a while, and reports false.
func (b *bystander) recover() (took time.Duration, ok bool) {
	for begun := time.Now(); ; took = time.Since(begun).Round(100 * time.Millisecond) {
		b.phase()
		time.Sleep(2 * probeInterval)
		f := b.phase()
		if ok = b.missing(lateness) == 0 && max(f.max, f.sendLatest) <= b.s.factor*calm; ok || took > lost {
			return took, ok
		}
	}
}

// quantile returns a quantile of durations, or 0 if there are none.
func quantile(of []time.Duration, q float64) time.Duration {
	if len(of) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(of))
	return sorted[int(q*float64(len(sorted)-1)+.5)].Round(time.Millisecond)
}

//go:build all

package hostile

import (
	"bytes"
	"context"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"github.com/tidwall/gjson"
)

const (
	// hostileUsers is how many users fuzz at once, and underWay how many of their inputs run at the same time.
	hostileUsers = 8
	underWay     = 96
	// quiet limits the time from the last input until all timers are gone.
	quiet = 60 * time.Second
)

// unlimited is a configuration in which few users may have many timers.
var unlimited = JSON{
	"max_running_per_user": 10_000,
	"rate_limiting":        JSON{"enabled": false},
	"delayed_events":       JSON{"max_scheduled_per_user": 10_000, "max_finalised_per_user": 10_000},
}

// Each event that several hostile users schedule is refused, or sent, or finalised with an error. Meanwhile the server still serves a
// bystander. The test replays the kept inputs, and then runs random ones. During these the server is stopped once and killed once, and
// started again.
func TestFuzzThroughTimers(t *testing.T) {
	onEachDatabase(t, func(t *testing.T, db database) {
		t.Run("Seeds", func(t *testing.T) { testSeeds(t, db) })
		t.Run("Random", func(t *testing.T) { testRandomInputs(t, db) })
	})
}

func testRandomInputs(t *testing.T, db database) {
	s := start(t, db, unlimited)
	f := newFuzzer(s, s.register(t, "hostile", hostileUsers))
	versions := roomVersions(t, f)
	// The first rooms are created before the measurements. Creating rooms slows down the server and delays /sync, as in stock Dendrite.
	for i := range uint64(len(f.users)) {
		for _, version := range []string{versions[2*i%uint64(len(versions))], versions[(2*i+1)%uint64(len(versions))]} {
			_, err := f.place(t.Context(), version, int(i))
			require.NoError(t, err)
		}
	}
	b := newBystander(t, s)
	first, last := uint64(1), uint64(*timersFlag)
	if *onlyFlag != 0 {
		first, last = *onlyFlag, *onlyFlag
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	started := time.Now()
	var index, done atomic.Uint64
	index.Store(first - 1)
	pause := make(chan bool, 2) // SIGTERM after a third of the inputs, SIGKILL after two thirds
	var inputs sync.WaitGroup
	go func() {
		for range underWay {
			inputs.Go(func() {
				for !f.died.Load() && time.Since(started) < *longestFlag {
					i := index.Add(1)
					if i > last {
						return
					}
					f.run(ctx, generate(*seedFlag, i, versions), int(i)%len(f.users))
					if n, share := done.Add(1), (last-first)/3; share > 0 && (n == share || n == 2*share) {
						pause <- n == 2*share
					}
				}
			})
		}
		inputs.Wait()
		close(pause)
	}()
	for kill := range pause {
		t.Logf("%d inputs done after %s", done.Load(), time.Since(started).Round(time.Second))
		f.bystander(b, "before a restart")
		if !f.died.Load() {
			s.restart(t, kill)
			b.disturb()
		}
	}
	t.Logf("%d inputs sent: %d accepted, %d refused in %s", min(index.Load(), last), f.accepted.Load(), f.refused.Load(), time.Since(started).Round(time.Second))
	f.finish(t, b)
}

// roomVersions returns the room versions that the server supports.
func roomVersions(t *testing.T, f *fuzzer) (versions []string) {
	res, err := f.users[0].Do(t.Context(), http.MethodGet, "/_matrix/client/v3/capabilities", nil)
	require.NoError(t, err)
	res.Get(`capabilities.m\.room_versions.available`).ForEach(func(version, _ gjson.Result) bool {
		versions = append(versions, version.Str)
		return true
	})
	require.Contains(t, versions, "org.matrix.msc4014")
	return sorted(versions)
}

// finish checks what is left after all inputs, restarts the server once more, and reports.
func (f *fuzzer) finish(t *testing.T, b *bystander) {
	defer f.found.report(t)
	defer f.searchLog(t)
	if f.died.Load() || !f.s.alive() {
		f.accuse(t)
		return
	}
	f.bystander(b, "at the end")
	f.awaitQuiet(t)
	f.s.restart(t, true)
	f.awaitQuiet(t)
	if events := b.lostEvents(); len(events) > 0 {
		f.found.add("the bystander's events are lost", nil, "%d of them: %s", len(events), strings.Join(events, "; "))
	}
	require.True(t, f.s.alive())
}

// accuse adds the inputs that may have ended the process to the findings.
func (f *fuzzer) accuse(t *testing.T) {
	f.found.add("the process ended", nil, "%d suspects", len(f.suspects()))
	for i, in := range f.suspects() {
		if i < 8 {
			f.found.add("the process ended, suspects", in, "")
		}
	}
}

// bystander checks the bystander's figures of a phase.
func (f *fuzzer) bystander(b *bystander, when string) {
	is := b.phase()
	f.found.note("the bystander's %d events %s: median %s, p99 %s, at most %s late; sends took %s, at most %s",
		is.count, when, is.median, is.p99, is.max, is.sendMedian, is.sendLatest)
	if is.p99 > f.s.lateness() {
		f.found.add("the bystander's events are late", nil, "%s: p99 %s, at most %s of %d, overdue %d: %s",
			when, is.p99, is.max, is.count, is.overdue, strings.Join(is.slow, "; "))
	}
	for answer, n := range is.refused {
		f.found.add("the bystander is refused", nil, "%d times: %s", n, answer)
	}
}

// awaitQuiet waits until the hostile users have no timers left.
func (f *fuzzer) awaitQuiet(t *testing.T) {
	t.Helper()
	for deadline := time.Now().Add(quiet); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if f.leftovers(t) == 0 {
			return
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, in := range f.delayed {
		f.found.add("a delayed event is left", in, "%s", id)
	}
	left := 0
	for token, in := range f.tokens {
		res, err := f.s.Anonymous().KeepAlive(t.Context(), "refresh", token)
		if err != nil || res.Code != http.StatusNotFound {
			left++
			f.found.add("an expiring event is left", in, "refresh: %s %v", res, err)
		}
	}
	f.found.note("%d timers left", left)
}

// leftovers returns how many timers there are, without a few that may be the bystander's.
func (f *fuzzer) leftovers(t *testing.T) int {
	t.Helper()
	const ofBystander = 15
	res, err := f.s.Anonymous().Do(t.Context(), http.MethodGet, "/metrics", nil)
	if err != nil {
		return ofBystander
	}
	left := metric(res.Body, "dendrite_expiration_running_timers") + metric(res.Body, "dendrite_expiration_scheduled_events")
	return max(0, int(left)-ofBystander)
}

// metric returns the sum of a metric's values.
func metric(text []byte, name string) (sum float64) {
	for line := range bytes.Lines(text) {
		fields := strings.Fields(string(line))
		if len(fields) == 2 && (fields[0] == name || strings.HasPrefix(fields[0], name+"{")) {
			sum += gjson.Parse(fields[1]).Num
		}
	}
	return sum
}

// searchLog searches the server's log for panics. A panic in a request shows in its answer, and may be stock Dendrite's fault.
func (f *fuzzer) searchLog(t *testing.T) {
	written, err := f.s.Written()
	require.NoError(t, err)
	for line := range bytes.Lines(written) {
		switch {
		case bytes.Contains(line, []byte("Request panicked")):
			f.found.note("a panic in a request: %.100s", lastFrame(line))
		case bytes.Contains(line, []byte("panic")):
			f.found.add("a panic in the log", nil, "%.1500s", line)
		}
	}
}

// lastFrame returns the function that panicked, from a stack in one line of the log.
func lastFrame(line []byte) string {
	_, stack, _ := strings.Cut(string(line), `panic({`)
	for part := range strings.SplitSeq(stack, `\n`) {
		if strings.Contains(part, "(") && !strings.HasPrefix(part, "panic(") && !strings.HasPrefix(part, "runtime.") && !strings.HasPrefix(part, `\t`) &&
			!strings.Contains(part, "?, 0x") {
			return part
		}
	}
	return "unknown"
}

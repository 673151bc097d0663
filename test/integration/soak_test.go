//go:build all

package integration

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/failpoint"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

var (
	soak   = flag.Duration("soak", 20*time.Second, "how long TestSoak lets its servers suffer")
	report = flag.String("report", "", "the file that TestSoak writes its report into")
)

// misfortune is a failure of a server. It is over when befall returns.
type misfortune struct {
	name   string
	befall func()
}

// TestSoak lets random clients act for a while. Meanwhile the server suffers all failures that it must survive. The test verifies all
// answers that the clients got, and writes a report of one page.
func TestSoak(t *testing.T) {
	var (
		mu    sync.Mutex // guards pages
		pages []string
	)
	t.Cleanup(func() {
		slices.Sort(pages)
		page := fmt.Sprintf("# Soak, %s, seed %d\n\n%s", *soak, *seed, strings.Join(pages, "\n"))
		t.Log("\n" + page)
		if *report != "" {
			require.NoError(t, os.WriteFile(*report, []byte(page), 0o600))
		}
	})
	for _, db := range databases {
		t.Run(db.name, func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(*seed, 1))
			cfg := homeserver.Config{Expiration: unlimited}
			awhile := func() { <-time.After(time.Second + time.Duration(random.IntN(2000))*time.Millisecond) }
			var misfortunes []misfortune
			if db.name == "PostgreSQL" {
				cluster, dsn := ownCluster(t)
				cfg.Postgres = dsn
				misfortunes = append(misfortunes, misfortune{"PostgreSQL was away", func() {
					cluster.Pause()
					awhile()
					require.NoError(t, cluster.Resume(t.Context()))
				}})
			}
			s := startWithFailpoints(t, cfg)
			during := func(p failpoint.Point, what string) func() {
				return func() {
					require.NoError(t, s.Failpoints(string(p)+" "+what))
					awhile()
					require.NoError(t, s.Failpoints())
				}
			}
			misfortunes = append(misfortunes,
				misfortune{"killed (SIGKILL)", func() { s.Kill(); require.NoError(t, s.Start(t.Context())) }},
				misfortune{"killed, and down for a while", func() { s.Kill(); awhile(); require.NoError(t, s.Start(t.Context())) }},
				misfortune{"restarted (SIGTERM)", func() { _ = s.Stop(); require.NoError(t, s.Start(t.Context())) }},
				misfortune{"the roomserver refused events", during(failpoint.BeforeInput, "fail")},
				misfortune{"the output stream was held up", during(failpoint.Stream, "hold")},
			)
			happened := s.suffer(t, random, misfortunes)
			mu.Lock()
			defer mu.Unlock()
			pages = append(pages, fmt.Sprintf("## %s\n\n%s", db.name, happened))
		})
	}
}

// suffer lets random clients act while failures befall the server, verifies the result, and returns the report.
func (s *server) suffer(t *testing.T, random *rand.Rand, misfortunes []misfortune) string {
	t.Helper()
	l := newLedger()
	for range 4 {
		l.newActor(t, s, *seed)
	}
	ctx, cancel := context.WithTimeout(t.Context(), *soak)
	defer cancel()
	var wg sync.WaitGroup
	for _, a := range l.actors {
		wg.Go(func() { a.actOn(ctx) })
	}
	times := map[string]int{}
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-s.Ended(): // Dendrite's components end the process when the database is down
			times["ended by itself"]++
			s.revive(t)
		case <-time.After(time.Duration(random.IntN(2000)) * time.Millisecond):
			m := misfortunes[random.IntN(len(misfortunes))]
			times[m.name]++
			m.befall()
		}
	}
	wg.Wait()
	s.revive(t)
	l.verify(t, s)
	return l.report(t, s, times)
}

// report describes the run in Markdown.
func (l *ledger) report(t *testing.T, s *server, misfortunes map[string]int) string {
	t.Helper()
	var b strings.Builder
	table := func(title string, rows map[string]int) {
		fmt.Fprintf(&b, "| %s | times |\n| --- | ---: |\n", title)
		for _, name := range slices.Sorted(maps.Keys(rows)) {
			fmt.Fprintf(&b, "| %s | %d |\n", name, rows[name])
		}
		b.WriteString("\n")
	}
	table("misfortune", misfortunes)
	answers := map[string]int{}
	for _, a := range l.actors {
		for code, n := range a.answers {
			if code == noAnswer {
				answers["none"] += n
			} else {
				answers[fmt.Sprint(code)] += n
			}
		}
	}
	table("answer", answers)
	outcomes := map[string]int{"running": 0, "replaced, or never sent": 0}
	for _, e := range s.events(t) {
		if outcome := e.json.Get(`content.m\.will_expire`).Str; outcome != "" {
			outcomes[outcome]++
		}
	}
	outcomes["replaced, or never sent"] = outcomes["running"] - outcomes["expired"] - outcomes["ended"]
	outcomes["events that expire"] = outcomes["running"]
	delete(outcomes, "running")
	table("event", outcomes)
	fmt.Fprintf(&b, "Faults: %d\n", len(l.faults))
	return b.String()
}

package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/google/pprof/profile"
	"github.com/prometheus/procfs"
)

// What the cores are busy with: where a goal is missed, it shows what stands in the way.

// spent is how long the cores were busy, with the work of whom.
type spent struct {
	server, database, load, all time.Duration
}

// spent returns what was spent since the machine, and each of these, was started.
func (b *comparison) spent(s *server) (now spent, err error) {
	if now.server, err = s.cpu(); err != nil {
		return now, err
	}
	self, err := procfs.Self()
	if err != nil {
		return now, err
	}
	if now.load, err = cpuTime(self); err != nil {
		return now, err
	}
	if b.cluster != nil {
		if now.database, err = cpuOfFamily(b.cluster.Pid()); err != nil {
			return now, err
		}
	}
	machine, err := procfs.NewFS(procfs.DefaultMountPoint)
	if err != nil {
		return now, err
	}
	stat, err := machine.Stat()
	if err != nil {
		return now, err
	}
	t := stat.CPUTotal
	now.all = time.Duration((t.User + t.Nice + t.System + t.IRQ + t.SoftIRQ + t.Steal) * float64(time.Second))
	return now, nil
}

// cpuOfFamily returns how long a process and its children have kept a CPU busy.
func cpuOfFamily(parent int) (sum time.Duration, err error) {
	processes, err := procfs.AllProcs()
	if err != nil {
		return 0, err
	}
	for _, p := range processes {
		stat, err := p.Stat()
		if err != nil || p.PID != parent && stat.PPID != parent { // one that ended meanwhile is none of ours
			continue
		}
		cpu, err := cpuTime(p)
		if err != nil {
			return 0, err
		}
		sum += cpu
	}
	return sum, nil
}

// cpuTime returns how long a process has kept a CPU busy.
func cpuTime(p procfs.Proc) (time.Duration, error) {
	stat, err := p.Stat()
	return time.Duration(stat.CPUTime() * float64(time.Second)), err
}

// busy makes keep-alives as fast as can be, and adds to the report what the cores do meanwhile, and what the server does.
func (b *comparison) busy(ctx context.Context, s *server, pprof string, tokens []string) error {
	d := 2 * *turn
	before, err := b.spent(s)
	if err != nil {
		return err
	}
	start := time.Now()
	if _, err = refresh(ctx, s.address, tokens, d, 0); err != nil {
		return err
	}
	took := time.Since(start) * time.Duration(runtime.NumCPU())
	after, err := b.spent(s)
	if err != nil {
		return err
	}
	share := func(what string, part, whole time.Duration) {
		b.add(what, "", " %", []float64{100 * float64(part) / float64(whole)})
	}
	share("keep-alives: the server keeps the cores busy for", after.server-before.server, took)
	if b.cluster != nil {
		share("keep-alives: the database", after.database-before.database, took)
	}
	share("keep-alives: the load", after.load-before.load, took)
	share("keep-alives: nobody", took-(after.all-before.all), took)

	type answer struct {
		spent map[string]time.Duration
		err   error
	}
	profiled := make(chan answer, 1)
	go func() {
		spent, err := profileServer(ctx, pprof, d)
		profiled <- answer{spent, err}
	}()
	if _, err = refresh(ctx, s.address, tokens, d+time.Second, 0); err != nil {
		return err
	}
	a := <-profiled
	if a.err != nil {
		return fmt.Errorf("profiling the server: %w", a.err)
	}
	var whole time.Duration
	for _, d := range a.spent {
		whole += d
	}
	for _, k := range kinds {
		share("keep-alives: of the server's CPU time, "+k.name, a.spent[k.name], whole)
	}
	return nil
}

// kinds are what a server spends its time on. What a function does for one that comes earlier here counts as that one's.
var kinds = []struct {
	name      string
	functions []string // or their beginnings
}{
	{"the database", []string{"database/sql."}},
	{"the component and its endpoint", []string{module + "expiration.", module + "clientapi."}},
	{"cleaning up memory", []string{"runtime.gcBgMarkWorker", "runtime.bgsweep", "runtime.bgscavenge"}},
	{"net/http and the network", []string{"net/http."}},
	{"scheduling goroutines", []string{""}},
}

const module = "github.com/matrix-org/dendrite/setup/mscs/msc4140/"

// profileServer returns for how long the server was busy with each kind of work.
func profileServer(ctx context.Context, address string, d time.Duration) (map[string]time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		fmt.Sprintf("http://%s/debug/pprof/profile?seconds=%d", address, int(d.Seconds()+.5)), nil)
	if err != nil {
		return nil, err
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(res.Body, 1000))
		return nil, fmt.Errorf("%s: %s", res.Status, text)
	}
	p, err := profile.Parse(res.Body)
	if err != nil {
		return nil, err
	}
	spent := map[string]time.Duration{}
	for _, sample := range p.Sample {
		spent[kindOf(sample)] += time.Duration(sample.Value[len(sample.Value)-1]) // in nanoseconds; before it stands their number
	}
	return spent, nil
}

func kindOf(sample *profile.Sample) string {
	for _, k := range kinds {
		for _, location := range sample.Location {
			for _, l := range location.Line {
				if slices.ContainsFunc(k.functions, func(f string) bool { return strings.HasPrefix(l.Function.Name, f) }) {
					return k.name
				}
			}
		}
	}
	return "" // a sample without a function
}

// withPprof calls start so that the server it starts listens for profilers, and returns where.
func withPprof(start func() error) (address string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	address = l.Addr().String()
	_ = l.Close()
	const listen = "PPROFLISTEN" // Dendrite's own
	if err = os.Setenv(listen, address); err != nil {
		return "", err
	}
	defer os.Unsetenv(listen)
	return address, start()
}

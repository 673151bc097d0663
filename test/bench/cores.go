package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"time"

	"github.com/google/pprof/profile"
	"github.com/prometheus/procfs"
)

// This file shows how the cores spend their time. That explains a missed goal.

// spent is the CPU time of each process, and of the whole machine.
type spent struct {
	server, database, load, all time.Duration
}

// spent returns the CPU time since the start of the machine and of each process. Without a server, this process is the one that is
// measured, and there is no load generator.
func (b *comparison) spent(s *server) (now spent, err error) {
	self, err := procfs.Self()
	if err != nil {
		return now, err
	}
	if now.server, err = cpuTime(self); err != nil {
		return now, err
	}
	if s != nil {
		now.load = now.server
		if now.server, err = s.cpu(); err != nil {
			return now, err
		}
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

// cores calls work, and adds to the report what the cores do meanwhile for the server, or for this process.
func (b *comparison) cores(what string, s *server, work func() error) error {
	before, err := b.spent(s)
	if err != nil {
		return err
	}
	start := time.Now()
	if err = work(); err != nil {
		return err
	}
	took := time.Since(start) * time.Duration(runtime.NumCPU())
	after, err := b.spent(s)
	if err != nil {
		return err
	}
	b.share(what+": the server keeps the cores busy for", after.server-before.server, took)
	if b.cluster != nil {
		b.share(what+": the database", after.database-before.database, took)
	}
	if s != nil {
		b.share(what+": the load", after.load-before.load, took)
	}
	b.share(what+": nobody", took-(after.all-before.all), took)
	return nil
}

// share adds to the report how large a part of the whole is.
func (b *comparison) share(what string, part, whole time.Duration) {
	b.add(what, "", " %", []float64{100 * float64(part) / float64(whole)})
}

// cpuOfFamily returns the CPU time of a process and its children, including the children that have ended.
func cpuOfFamily(parent int) (sum time.Duration, err error) {
	processes, err := procfs.AllProcs()
	if err != nil {
		return 0, err
	}
	for _, p := range processes {
		stat, err := p.Stat()
		if err != nil || p.PID != parent && stat.PPID != parent { // a process that ended meanwhile is none of ours
			continue
		}
		if p.PID == parent { // its times include those of its children that have ended
			stat.UTime, stat.STime = stat.UTime+uint(stat.CUTime), stat.STime+uint(stat.CSTime)
		}
		sum += seconds(stat.CPUTime())
	}
	return sum, nil
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// cpuTime returns the CPU time of a process.
func cpuTime(p procfs.Proc) (time.Duration, error) {
	stat, err := p.Stat()
	return seconds(stat.CPUTime()), err
}

// profileFor is how long a server is profiled.
const profileFor = 5 * time.Second

// profiled calls work, and adds to the report how a server spends the first few seconds of it. The server listens for profilers at
// address.
func (b *comparison) profiled(ctx context.Context, what, address string, work func() error) error {
	fetched := make(chan error, 1)
	var p *profile.Profile
	go func() {
		var err error
		p, err = fetchProfile(ctx, address, profileFor)
		fetched <- err
	}()
	if err := errors.Join(work(), <-fetched); err != nil {
		return err
	}
	b.addProfile(what, p)
	return nil
}

// profiledHere calls work, and adds to the report how this process spends its time meanwhile.
func (b *comparison) profiledHere(what string, work func() error) error {
	var data bytes.Buffer
	if err := pprof.StartCPUProfile(&data); err != nil {
		return err
	}
	err := work()
	pprof.StopCPUProfile()
	if err != nil {
		return err
	}
	p, err := profile.Parse(&data)
	if err != nil {
		return err
	}
	b.addProfile(what, p)
	return nil
}

// kinds are the kinds of work that a server does. A function that works on behalf of an earlier kind counts as that kind.
var kinds = []struct {
	name      string
	functions []string // names of functions, or prefixes of names
}{
	{"the database, or its driver", []string{"database/sql.", "github.com/mattn/go-sqlite3.", "github.com/lib/pq."}},
	{"JetStream", []string{"github.com/nats-io/"}},
	{"reading, signing and checking events", []string{"github.com/matrix-org/gomatrixserverlib"}},
	{"Dendrite", []string{
		dendrite + "clientapi/", dendrite + "roomserver/", dendrite + "syncapi/", dendrite + "userapi/", dendrite + "federationapi/",
		dendrite + "internal/", dendrite + "setup/jetstream",
	}},
	{"the component and its endpoint", []string{dendrite + "setup/mscs/msc4140/"}},
	{"cleaning up memory", []string{"runtime.gcBgMarkWorker", "runtime.bgsweep", "runtime.bgscavenge"}},
	{"net/http and the network", []string{"net/http."}},
	{"scheduling goroutines", []string{""}},
}

const dendrite = "github.com/matrix-org/dendrite/"

// addProfile adds to the report how much of a profile's time went into each kind of work.
func (b *comparison) addProfile(what string, p *profile.Profile) {
	var whole time.Duration
	spent := map[string]time.Duration{}
	for _, sample := range p.Sample {
		d := time.Duration(sample.Value[len(sample.Value)-1]) // in nanoseconds; the value before it is the number of samples
		spent[kindOf(sample)] += d
		whole += d
	}
	for _, k := range kinds {
		if d := spent[k.name]; d > 0 {
			b.share(what+": of the server's CPU time, "+k.name, d, whole)
		}
	}
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
	return "" // a sample without a known function
}

// fetchProfile returns a CPU profile of the server.
func fetchProfile(ctx context.Context, address string, d time.Duration) (*profile.Profile, error) {
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
		return nil, fmt.Errorf("profiling the server: %s: %s", res.Status, text)
	}
	return profile.Parse(res.Body)
}

// withPprof calls start, so that the started server listens for profilers. It returns the address.
func withPprof(start func() error) (address string, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	address = l.Addr().String()
	_ = l.Close()
	const listen = "PPROFLISTEN" // Dendrite's own environment variable
	if err = os.Setenv(listen, address); err != nil {
		return "", err
	}
	defer os.Unsetenv(listen)
	return address, start()
}

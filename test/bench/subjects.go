package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/process"
	"github.com/prometheus/procfs"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// The servers that our own is compared with are this program, in separate processes.
var (
	serveBare  = flag.Bool("serve-bare", false, "be the bare endpoint (used by the benchmark itself)")
	serveNaive = flag.String("serve-naive", "", "be the endpoint with one transaction for each keep-alive, on this database (used by the benchmark itself)")
	serveBatch = flag.String("serve-batch", "", "be the bare endpoint, but for commits of batches, on this database (used by the benchmark itself)")
)

// endless is the duration of timers that do not expire during a measurement.
const endless = 24 * time.Hour

// serve is the main function of such a process: it prints its address, and serves until it is killed.
func serve(ctx context.Context) error {
	keep := func(context.Context, string) error { return nil }
	if dsn := cmp.Or(*serveNaive, *serveBatch); dsn != "" {
		store, closeStore, err := openStore(ctx, dsn)
		if err != nil {
			return err
		}
		defer closeStore()
		commit := store.Refresh
		if *serveBatch != "" {
			commit = inBatches(ctx, store)
			if config.DataSource(dsn).IsSQLite() {
				runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 2) // like our server, see cmd/dendrite
			}
		}
		keep = func(ctx context.Context, token string) error {
			nid, err := timerOf(token)
			if err != nil {
				return err
			}
			found, err := commit(ctx, []expiration.Refresh{{
				NID: nid, Duration: endless, Deadline: time.Now().Add(endless),
			}})
			if err == nil && !found[0] {
				err = errors.New("no such timer")
			}
			return err
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(l.Addr())
	return http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		var body struct {
			Token string `json:"expire_refresh_token"`
		}
		if err := json.NewDecoder(req.Body).Decode(&body); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		if err := keep(req.Context(), body.Token); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(struct{}{})
	}))
}

// inBatches returns a function like the store's Refresh that takes one refresh at a time. It is a group commit: refreshes that arrive
// during a commit form the next batch. It does nothing else, so no endpoint that commits to this store can be much faster.
func inBatches(ctx context.Context, store expiration.Store) func(context.Context, []expiration.Refresh) ([]bool, error) {
	type answer struct {
		found bool
		err   error
	}
	type question struct {
		refresh expiration.Refresh
		answer  chan answer
	}
	questions := make(chan question, manyConnections)
	go func() {
		for q := range questions {
			batch, refreshes := []question{q}, []expiration.Refresh{q.refresh}
			places := map[int64]int{q.refresh.NID: 0} // a batch has each timer once
			for len(questions) > 0 {
				q = <-questions
				batch = append(batch, q)
				if _, ok := places[q.refresh.NID]; !ok {
					places[q.refresh.NID] = len(refreshes)
					refreshes = append(refreshes, q.refresh)
				}
			}
			found, err := store.Refresh(ctx, refreshes)
			for _, q := range batch {
				q.answer <- answer{err == nil && found[places[q.refresh.NID]], err}
			}
		}
	}()
	return func(_ context.Context, refreshes []expiration.Refresh) ([]bool, error) {
		q := question{refreshes[0], make(chan answer, 1)}
		questions <- q
		a := <-q.answer
		return []bool{a.found}, a.err
	}
}

// startSelf starts this program as one of the servers, and returns its address.
func startSelf(ctx context.Context, args ...string) (address string, stop func(), err error) {
	self, err := os.Executable()
	if err != nil {
		return "", nil, err
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", nil, err
	}
	if err = cmd.Start(); err != nil {
		return "", nil, err
	}
	stop = func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	if _, err = fmt.Fscanln(out, &address); err != nil {
		stop()
		return "", nil, fmt.Errorf("%v did not start: %w", args, err)
	}
	return address, stop, nil
}

// binaries are the servers that are compared.
type binaries struct {
	ours, stock string
}

// stockPkg is Dendrite's own command, in the version that this module depends on.
const stockPkg = "github.com/matrix-org/dendrite/cmd/dendrite"

// build compiles the servers into dir.
func build(ctx context.Context, dir string) (b binaries, err error) {
	progress("building this server and stock Dendrite")
	if b.ours, err = homeserver.Build(ctx, dir); err != nil {
		return b, err
	}
	b.stock = filepath.Join(dir, "stock")
	if out, err := exec.CommandContext(ctx, "go", "build", "-o", b.stock, stockPkg).CombinedOutput(); err != nil {
		return b, fmt.Errorf("building stock Dendrite: %w\n%s", err, out)
	}
	return b, nil
}

// database is the place where one server keeps its data.
type database struct {
	dendrite string // "" for SQLite
	timers   string
	keys     *expiration.Tokens
}

// newDatabase makes an empty database. Data in files goes into a folder with the given name.
func (b *comparison) newDatabase(ctx context.Context, name string) (d database, err error) {
	dir := filepath.Join(b.dir, name)
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return d, err
	}
	if d.keys, err = expiration.NewTokens([]byte("benchmark")); err != nil {
		return d, err
	}
	if b.cluster == nil {
		d.timers = "file:" + filepath.Join(dir, "timers.db")
		return d, nil
	}
	if d.dendrite, err = b.cluster.NewDatabase(ctx); err != nil {
		return d, err
	}
	d.timers, err = b.cluster.NewDatabase(ctx)
	return d, err
}

// server is one of the two homeservers.
type server struct {
	*homeserver.Server
	database
	address string
	started time.Duration // how long the last start took
}

// newOurs returns our server, which does not run yet. Its timers have a database of their own.
func (b *comparison) newOurs(ctx context.Context, name string) (*server, error) {
	return b.newServer(ctx, b.binaries.ours, name, map[string]any{
		"max_running_per_user": 1_000_000,
		"rate_limiting":        map[string]any{"token": map[string]any{"threshold": 1_000_000}},
	})
}

func (b *comparison) newServer(ctx context.Context, binary, name string, section map[string]any) (*server, error) {
	d, err := b.newDatabase(ctx, name)
	if err != nil {
		return nil, err
	}
	cfg := homeserver.Config{Postgres: d.dendrite, LogLevel: "info", Expiration: section}
	if section != nil {
		cfg.ExpirationDatabase = d.timers
	}
	s, err := homeserver.New(binary, filepath.Join(b.dir, name), cfg)
	if err != nil {
		return nil, err
	}
	seed, err := s.Seed()
	if err != nil {
		return nil, err
	}
	if d.keys, err = expiration.NewTokens(seed); err != nil {
		return nil, err
	}
	return &server{Server: s, database: d, address: strings.TrimPrefix(s.URL, "http://")}, nil
}

// startBoth starts our server and stock Dendrite, and creates them at the first call. It returns the address at which ours listens for
// profilers.
func (b *comparison) startBoth(ctx context.Context) (pprof string, stop func(), err error) {
	if b.own == nil {
		if b.own, err = b.newOurs(ctx, "ours"); err != nil {
			return "", nil, err
		}
		if b.stock, err = b.newServer(ctx, b.binaries.stock, "stock", nil); err != nil {
			return "", nil, err
		}
	}
	if pprof, err = withPprof(func() error { return b.own.start(ctx) }); err != nil {
		return "", nil, err
	}
	if err = b.stock.start(ctx); err != nil {
		b.own.Kill()
		return "", nil, err
	}
	return pprof, func() {
		if err := errors.Join(b.own.Stop(), b.stock.Stop()); err != nil {
			progress("%s: %s", b.name, err)
		}
	}, nil
}

func (s *server) start(ctx context.Context) error {
	start := time.Now()
	err := s.Start(ctx)
	s.started = time.Since(start)
	return err
}

// memory returns the server's resident memory, in bytes.
func (s *server) memory() (int64, error) {
	p, err := procfs.NewProc(s.Pid())
	if err != nil {
		return 0, err
	}
	stat, err := p.Stat()
	return int64(stat.ResidentMemory()), err
}

// cpu returns the CPU time of the server.
func (s *server) cpu() (time.Duration, error) {
	p, err := procfs.NewProc(s.Pid())
	if err != nil {
		return 0, err
	}
	return cpuTime(p)
}

// renewals returns a refresh for each timer, without a deadline.
func renewals(ctx context.Context, store expiration.Store) (all []expiration.Refresh, err error) {
	return all, store.Index(ctx, func(t expiration.Indexed) error {
		all = append(all, expiration.Refresh{NID: t.NID, Duration: endless})
		return nil
	})
}

// openStore opens a database of timers, as the server does.
func openStore(ctx context.Context, dsn string) (store expiration.Store, closeStore func(), err error) {
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
	options.Defaults(connections)
	options.MaxIdleConnections = connections // so that no connection is opened during a measurement
	processCtx := process.NewProcessContext()
	closeStore = func() {
		processCtx.ShutdownDendrite()
		processCtx.WaitForComponentsToFinish()
	}
	if store, err = storage.Open(ctx, sqlutil.NewConnectionManager(processCtx, config.DatabaseOptions{}), options); err != nil {
		closeStore()
	}
	return store, closeStore, err
}

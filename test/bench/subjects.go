package main

import (
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
	"strings"
	"time"

	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"
	"github.com/matrix-org/dendrite/setup/process"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/storage"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

// The servers that our own is compared with are this program itself, in processes of their own.
var (
	serveBare  = flag.Bool("serve-bare", false, "be the bare endpoint (used by the benchmark itself)")
	serveNaive = flag.String("serve-naive", "", "be the endpoint with one transaction for each keep-alive, on this database (used by the benchmark itself)")
)

// endless is the duration of timers that do not run out while they are measured.
const endless = 24 * time.Hour

// serve is what such a process does: it prints its address, and serves until it is killed.
func serve(ctx context.Context) error {
	keep := func(context.Context, string) error { return nil }
	if *serveNaive != "" {
		store, closeStore, err := openStore(ctx, *serveNaive)
		if err != nil {
			return err
		}
		defer closeStore()
		nids := map[expiration.TokenHash]int64{}
		if err = store.Timers(ctx, func(t expiration.Timer) error {
			nids[t.TokenHash] = t.NID
			return nil
		}); err != nil {
			return err
		}
		keep = func(ctx context.Context, token string) error {
			found, err := store.Refresh(ctx, []expiration.Refresh{{
				NID: nids[expiration.HashToken(token)], Duration: endless, Deadline: time.Now().Add(endless),
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

// ours is our own server.
type ours struct {
	*homeserver.Server
	address string
	started time.Duration // how long the last start took
}

// newOurs returns our server, not running yet, with a database of its own for the timers.
func newOurs(binary, dir string, db database) (*ours, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	s, err := homeserver.New(binary, dir, homeserver.Config{
		Postgres: db.dendrite, ExpirationDatabase: db.timers, LogLevel: "info",
		Expiration: map[string]any{"rate_limiting": map[string]any{"token": map[string]any{"threshold": 1_000_000}}},
	})
	if err != nil {
		return nil, err
	}
	return &ours{Server: s, address: strings.TrimPrefix(s.URL, "http://")}, nil
}

func (o *ours) start(ctx context.Context) error {
	start := time.Now()
	err := o.Start(ctx)
	o.started = time.Since(start)
	return err
}

// memory returns how much memory the server occupies, in bytes.
func (o *ours) memory() (int64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", o.Pid()))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		var kib int64
		if _, err := fmt.Sscanf(line, "VmRSS: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, errors.New("no VmRSS")
}

// database is where a server keeps its data.
type database struct {
	name     string
	dendrite string // "" for SQLite
	timers   string
}

func sqlite(dir string) database {
	return database{name: "SQLite", timers: "file:" + filepath.Join(dir, "timers.db")}
}

// openStore opens a database of timers, as the server does.
func openStore(ctx context.Context, dsn string) (store expiration.Store, closeStore func(), err error) {
	options := &config.DatabaseOptions{ConnectionString: config.DataSource(dsn)}
	options.Defaults(connections)
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

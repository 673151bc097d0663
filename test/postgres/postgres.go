// Package postgres starts a PostgreSQL server for tests, from Debian's packages or any other installation.
//
// One cluster serves a whole test binary, and each test gets a database of its own in it. The cluster listens only on loopback. Stopping
// it removes its folder.
package postgres

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	_ "github.com/lib/pq" // the driver that Dendrite uses

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/patience"
)

// ErrNotInstalled says that this machine has no PostgreSQL server.
var ErrNotInstalled = errors.New("no PostgreSQL server found: install one (Debian: apt-get install postgresql)")

// startTimeout limits the start and the stop of a cluster on an idle machine.
const startTimeout = 60 * time.Second

// Cluster is a running PostgreSQL server.
type Cluster struct {
	dir string
	bin string
	// settings are the lines of postgresql.conf that differ from the defaults.
	settings []string
	port     int
	creds    *syscall.SysProcAttr
	cmd      *exec.Cmd
	exited   chan struct{}
	names    atomic.Int64
}

// Unsafe are settings for tests in which PostgreSQL does not crash: it does not wait for the disk.
var Unsafe = []string{"fsync=off", "full_page_writes=off"}

// Start makes a cluster in a folder of its own and starts it. The settings are lines of postgresql.conf.
func Start(ctx context.Context, settings ...string) (*Cluster, error) {
	bin, err := findBinaries()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "msc4140-postgres-")
	if err != nil {
		return nil, err
	}
	c := &Cluster{dir: dir, bin: bin, settings: settings}
	if err = c.initialise(ctx); err != nil {
		_ = os.RemoveAll(dir)
		return nil, err
	}
	if err = c.Resume(ctx); err != nil {
		c.Stop()
		return nil, err
	}
	return c, nil
}

// findBinaries returns the folder with initdb and postgres.
func findBinaries() (string, error) {
	candidates, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil {
		return "", err
	}
	slices.SortFunc(candidates, func(a, b string) int { return version(b) - version(a) })
	if path, err := exec.LookPath("initdb"); err == nil {
		if path, err = filepath.EvalSymlinks(path); err == nil {
			candidates = append(candidates, filepath.Dir(path))
		}
	}
	for _, dir := range candidates {
		if _, err := os.Stat(filepath.Join(dir, "postgres")); err == nil {
			return dir, nil
		}
	}
	return "", ErrNotInstalled
}

// version returns the version in a path such as /usr/lib/postgresql/15/bin.
func version(bin string) int {
	n, _ := strconv.Atoi(filepath.Base(filepath.Dir(bin)))
	return n
}

func (c *Cluster) initialise(ctx context.Context) error {
	if err := c.leaveRoot(); err != nil {
		return err
	}
	cmd := c.command(ctx, "initdb", "--pgdata", c.data(), "--username", "dendrite", "--auth", "trust",
		"--encoding", "UTF8", "--locale", "C", "--no-sync")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	return nil
}

// leaveRoot makes the server run as an unprivileged user if this process is root, because PostgreSQL refuses to run as root.
func (c *Cluster) leaveRoot() error {
	if os.Geteuid() != 0 {
		return nil
	}
	account, err := user.Lookup("postgres")
	if err != nil {
		return fmt.Errorf("PostgreSQL does not run as root: %w", err)
	}
	uid, err := strconv.Atoi(account.Uid)
	if err != nil {
		return err
	}
	gid, err := strconv.Atoi(account.Gid)
	if err != nil {
		return err
	}
	c.creds = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	return os.Chown(c.dir, uid, gid)
}

func (c *Cluster) data() string { return filepath.Join(c.dir, "data") }

func (c *Cluster) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(c.bin, name), args...)
	cmd.Dir, cmd.SysProcAttr = c.dir, c.creds
	return cmd
}

// Resume starts the server, for the first time or after Pause.
func (c *Cluster) Resume(ctx context.Context) error {
	if c.port == 0 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		c.port = l.Addr().(*net.TCPAddr).Port
		_ = l.Close()
	}
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	args := []string{"-D", c.data(), "-k", c.dir, "-c", "listen_addresses=127.0.0.1", "-p", strconv.Itoa(c.port), "-c", "max_connections=1000"}
	for _, setting := range c.settings {
		args = append(args, "-c", setting)
	}
	c.cmd = c.command(context.WithoutCancel(ctx), "postgres", args...)
	c.cmd.Stdout, c.cmd.Stderr = log, log
	if err = c.cmd.Start(); err != nil {
		return err
	}
	exited := make(chan struct{})
	c.exited = exited
	go func() {
		_ = c.cmd.Wait()
		close(exited)
	}()
	return c.waitUntilUp(ctx)
}

// Pid returns the process ID of the server. Its children do the work.
func (c *Cluster) Pid() int { return c.cmd.Process.Pid }

func (c *Cluster) waitUntilUp(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, patience.For(startTimeout))
	defer cancel()
	db, err := sql.Open("postgres", c.dsn("postgres"))
	if err != nil {
		return err
	}
	defer db.Close()
	for {
		if err = db.PingContext(ctx); err == nil {
			return nil
		}
		select {
		case <-c.exited:
			out, _ := os.ReadFile(filepath.Join(c.dir, "log"))
			return fmt.Errorf("PostgreSQL did not start:\n%s", out)
		case <-ctx.Done():
			return fmt.Errorf("PostgreSQL did not come up: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Analyse updates the planner's statistics of all tables, in all databases.
func (c *Cluster) Analyse(ctx context.Context) error {
	cmd := c.command(ctx, "vacuumdb", "--all", "--analyze-only", "--quiet", "--host", "127.0.0.1", "--port", strconv.Itoa(c.port), "--username", "dendrite")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("vacuumdb: %w\n%s", err, out)
	}
	return nil
}

// Pause stops the server at once: it cuts the connections and keeps the data.
func (c *Cluster) Pause() {
	if c.cmd == nil {
		return
	}
	_ = c.cmd.Process.Signal(syscall.SIGINT)
	select {
	case <-c.exited:
	case <-time.After(patience.For(startTimeout)):
		_ = c.cmd.Process.Signal(syscall.SIGQUIT)
		<-c.exited
	}
	c.cmd = nil
}

// Stop stops the server and removes its folder.
func (c *Cluster) Stop() {
	c.Pause()
	_ = os.RemoveAll(c.dir)
}

// NewDatabase makes an empty database and returns its connection string.
func (c *Cluster) NewDatabase(ctx context.Context) (string, error) {
	db, err := sql.Open("postgres", c.dsn("postgres"))
	if err != nil {
		return "", err
	}
	defer db.Close()
	name := fmt.Sprintf("test_%d", c.names.Add(1))
	if _, err = db.ExecContext(ctx, "CREATE DATABASE "+name); err != nil {
		return "", err
	}
	return c.dsn(name), nil
}

// Dump returns the whole content of a database, as text.
func Dump(ctx context.Context, dsn string) ([]byte, error) {
	bin, err := findBinaries()
	if err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(bin, "pg_dump"), "--dbname", dsn).Output()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		err = fmt.Errorf("pg_dump: %w\n%s", err, exit.Stderr)
	}
	return out, err
}

func (c *Cluster) dsn(database string) string {
	return fmt.Sprintf("postgres://dendrite@127.0.0.1:%d/%s?sslmode=disable", c.port, database)
}

package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"

	msc4140config "github.com/matrix-org/dendrite/setup/mscs/msc4140/config"
)

// addresses are the addresses that the server listens on.
type addresses struct {
	http, https config.ServerAddress // https may not be enabled
}

func listenAddresses() (addresses, error) {
	var (
		listen addresses
		err    error
	)
	if *unixSocket != "" {
		if listen.http, err = config.UnixSocketAddress(*unixSocket, *unixSocketPermission); err != nil {
			return listen, fmt.Errorf("bad unix socket: %w", err)
		}
		return listen, nil
	}
	if listen.http, err = config.HTTPAddress("http://" + *httpBindAddr); err != nil {
		return listen, fmt.Errorf("bad HTTP address %q: %w", *httpBindAddr, err)
	}
	if *certFile == "" || *keyFile == "" {
		return listen, nil
	}
	if listen.https, err = config.HTTPAddress("https://" + *httpsBindAddr); err != nil {
		return listen, fmt.Errorf("bad HTTPS address %q: %w", *httpsBindAddr, err)
	}
	return listen, nil
}

// preflight checks for faults that would make the components fail one by one, with many messages, in a half-started server: ports in use,
// files and folders that are not writable, and a second server on the same data. It holds its locks until unlock is called or the process
// ends.
func preflight(cfg *config.Dendrite, extension *msc4140config.Config, listen addresses) (unlock func(), err error) {
	for _, address := range []config.ServerAddress{listen.http, listen.https} {
		if !address.Enabled() || address.IsUnixSocket() {
			continue
		}
		l, err := net.Listen("tcp", address.Address)
		if err != nil {
			return nil, fmt.Errorf("cannot listen: %w", err)
		}
		_ = l.Close()
	}
	unlockStreams, err := lockStreams(&cfg.Global.JetStream)
	if err != nil {
		return nil, err
	}
	for _, database := range append(msc4140config.Databases(cfg), extension.Database) {
		if err = checkSQLite(database.ConnectionString); err != nil {
			unlockStreams()
			return nil, err
		}
	}
	unlockTimers, err := lockTimers(extension.Database.ConnectionString)
	if err != nil {
		unlockStreams()
		return nil, err
	}
	return func() { unlockTimers(); unlockStreams() }, nil
}

// lockStreams creates the folder of the embedded NATS server and locks it, because two servers would destroy each other's streams. NATS
// needs a folder even if all streams are in memory. Its default folder is shared by all servers of the machine, and may belong to another
// user. In that case this server gets a folder of its own, which is removed at the end.
func lockStreams(cfg *config.JetStream) (unlock func(), err error) {
	if len(cfg.Addresses) > 0 {
		return func() {}, nil
	}
	if cfg.StoragePath == "" && !cfg.InMemory {
		return nil, errors.New(`configuration error: config key "global.jetstream.storage_path" is missing`)
	}
	if cfg.StoragePath == "" {
		dir, err := os.MkdirTemp("", "dendrite-jetstream-")
		if err != nil {
			return nil, fmt.Errorf("cannot make a folder for JetStream: %w", err)
		}
		cfg.StoragePath = config.Path(dir)
		return func() { _ = os.RemoveAll(dir) }, nil
	}
	if err = os.MkdirAll(string(cfg.StoragePath), 0o700); err != nil {
		return nil, fmt.Errorf("cannot write the data folder: %w", err)
	}
	return lock(filepath.Join(string(cfg.StoragePath), "dendrite.lock"))
}

// lockTimers locks an SQLite database of timers against a second server. That server may have streams of its own, or keep them in memory.
// Without the lock, both servers would send the same events.
func lockTimers(source config.DataSource) (unlock func(), err error) {
	if !source.IsSQLite() {
		return func() {}, nil
	}
	name, err := sqlutil.ParseFileURI(source)
	if err != nil {
		return nil, fmt.Errorf("bad database %q: %w", source, err)
	}
	return lock(name + ".lock")
}

func lock(name string) (unlock func(), err error) {
	lock := flock.New(name, flock.SetPermissions(0o600))
	locked, err := lock.TryLock()
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot write the data folder: %w", err)
	case !locked:
		return nil, fmt.Errorf("the data folder is in use by another server: %s is locked", name)
	}
	return func() { _ = lock.Unlock() }, nil
}

// checkSQLite opens a database file for writing, and creates it if need be, as opening the database would. It does the same with the files
// that SQLite keeps beside it, and checks their folder. If one of them is not writable, SQLite allows reads but refuses writes.
func checkSQLite(source config.DataSource) error {
	if !source.IsSQLite() {
		return nil
	}
	name, err := sqlutil.ParseFileURI(source)
	if err != nil {
		return fmt.Errorf("bad database %q: %w", source, err)
	}
	open := func(name string, flags int) error {
		f, err := os.OpenFile(name, os.O_RDWR|flags, 0o600)
		if err == nil {
			err = f.Close()
		}
		return err
	}
	if err = open(name, os.O_CREATE); err != nil {
		return fmt.Errorf("cannot write a database: %w", err)
	}
	for _, beside := range []string{"-wal", "-shm", "-journal"} {
		if err = open(name+beside, 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot write a database: %w", err)
		}
	}
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+"-check-*")
	if err != nil {
		return fmt.Errorf("cannot write the folder of a database: %w", err)
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

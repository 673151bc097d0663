package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/gofrs/flock"
	"github.com/matrix-org/dendrite/internal/sqlutil"
	"github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140"
)

// addresses is where the server listens.
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

// preflight looks for what would make the components fail one by one, in many words and half started: ports that are
// taken, folders that cannot be written, and a second server on the same data. The lock that it takes is held until
// unlock is called, or the process ends in whatever way.
func preflight(cfg *config.Dendrite, extension *msc4140.Config, listen addresses) (unlock func(), err error) {
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
	unlock, err = lockStorage(cfg)
	if err != nil {
		return nil, err
	}
	for _, database := range []*config.DatabaseOptions{
		&cfg.Global.DatabaseOptions, &cfg.FederationAPI.Database, &cfg.KeyServer.Database, &cfg.MediaAPI.Database,
		&cfg.RoomServer.Database, &cfg.SyncAPI.Database, &cfg.UserAPI.AccountDatabase, &cfg.RelayAPI.Database,
		&cfg.MSCs.Database, &extension.Database,
	} {
		if err = checkSQLite(database.ConnectionString); err != nil {
			unlock()
			return nil, err
		}
	}
	return unlock, nil
}

// lockStorage makes the folder of the embedded NATS server and locks it: two servers would destroy each other's streams.
func lockStorage(cfg *config.Dendrite) (unlock func(), err error) {
	if len(cfg.Global.JetStream.Addresses) > 0 {
		return func() {}, nil
	}
	dir := string(cfg.Global.JetStream.StoragePath)
	if err = os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot write the data folder: %w", err)
	}
	lock := flock.New(filepath.Join(dir, "dendrite.lock"))
	locked, err := lock.TryLock()
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot write the data folder: %w", err)
	case !locked:
		return nil, fmt.Errorf("the data folder is in use by another server: %s is locked", lock.Path())
	}
	return func() { _ = lock.Unlock() }, nil
}

// checkSQLite opens a database file for writing, which makes it if need be, as opening the database would.
func checkSQLite(source config.DataSource) error {
	if !source.IsSQLite() {
		return nil
	}
	name, err := sqlutil.ParseFileURI(source)
	if err != nil {
		return fmt.Errorf("bad database %q: %w", source, err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("cannot write a database: %w", err)
	}
	return f.Close()
}

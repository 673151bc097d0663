package main

import (
	"bytes"
	"crypto/rand"
	"database/sql"
	_ "embed"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"text/template"

	"github.com/matrix-org/dendrite/setup/config"
	"github.com/sirupsen/logrus"
)

// defaultConfig is the file that stock Dendrite reads if --config is not given.
const defaultConfig = "dendrite.yaml"

//go:embed dendrite.yaml.tmpl
var configTemplate string

// home is the data folder of a server that was started without a configuration file. It is nil if there is such a file.
type home struct {
	dir string
}

// openHome decides whether the server runs from a data folder. If so, it creates the missing files and sets the flags as if the command
// line contained them.
func openHome() (*home, error) {
	given := map[string]bool{}
	flag.Visit(func(f *flag.Flag) { given[f.Name] = true })
	if given["config"] {
		if given["data"] {
			return nil, errors.New("--data and --config exclude each other")
		}
		return nil, nil
	}
	if _, err := os.Stat(defaultConfig); err == nil && !given["data"] {
		return nil, nil // as stock does
	}
	dir, err := filepath.Abs(*dataDir)
	if err != nil {
		return nil, err
	}
	h := &home{dir: dir}
	if err = h.make(); err != nil {
		return nil, fmt.Errorf("cannot set up the data folder %s: %w", dir, err)
	}
	if err = flag.Set("config", h.path(defaultConfig)); err != nil {
		return nil, err
	}
	if !given["http-bind-address"] {
		return h, flag.Set("http-bind-address", "127.0.0.1:8008")
	}
	return h, nil
}

func (h *home) path(name string) string { return filepath.Join(h.dir, name) }

// make writes the signing key and the configuration, unless they exist.
func (h *home) make() error {
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		return err
	}
	if err := writeNew(h.path("matrix_key.pem"), newSigningKey()); err != nil {
		return err
	}
	cfg, err := h.newConfig()
	if err != nil {
		return err
	}
	return writeNew(h.path(defaultConfig), cfg)
}

// newConfig fills in the template.
func (h *home) newConfig() ([]byte, error) {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	tmpl, err := template.New("").Funcs(template.FuncMap{
		"file": func(name string) string { return fmt.Sprintf("%q", h.path(name)) },
		"sqlite": func(name string) string {
			return fmt.Sprintf("%q", (&url.URL{Scheme: "file", Path: h.path("dendrite_" + name + ".db")}).String())
		},
	}).Parse(configTemplate)
	if err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	err = tmpl.Execute(&buf, map[string]string{"Secret": hex.EncodeToString(secret)})
	return buf.Bytes(), err
}

// newSigningKey returns a new key in the format of Dendrite's generate-keys.
func newSigningKey() []byte {
	seed, id := make([]byte, 32), make([]byte, 3)
	_, _ = rand.Read(seed) // never fails
	_, _ = rand.Read(id)
	return pem.EncodeToMemory(&pem.Block{
		Type:    "MATRIX PRIVATE KEY",
		Headers: map[string]string{"Key-ID": "ed25519:" + hex.EncodeToString(id)},
		Bytes:   seed,
	})
}

// writeNew writes a file that only its owner may read, unless the name is taken. The file appears complete or not at all.
func writeNew(name string, data []byte) error {
	if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

// quiet keeps log lines below warnings off the terminal, because the data folder has the log. Dendrite always adds a hook for the terminal
// to the hooks in the configuration. A terminal hook in the configuration stays as it is.
func (h *home) quiet(cfg *config.Dendrite) {
	if slices.ContainsFunc(cfg.Logging, func(hook config.LogrusHook) bool { return hook.Type == "std" }) {
		return
	}
	hooks := logrus.StandardLogger().Hooks
	if n := len(hooks[logrus.InfoLevel]); n > 0 {
		hooks[logrus.InfoLevel] = hooks[logrus.InfoLevel][:n-1]
	}
}

// welcome tells the operator what to do after the first start, and how to create a user if there is none yet.
func (h *home) welcome(address string, accounts *sql.DB) {
	fmt.Printf(`Dendrite with expiring events is running.

  listening   http://%s
  data        %s
  log         %s

`, address, h.dir, h.path("log"))
	var one int
	if errors.Is(accounts.QueryRow("SELECT 1 FROM userapi_accounts LIMIT 1").Scan(&one), sql.ErrNoRows) {
		fmt.Printf(`Make the first user with
  go run github.com/matrix-org/dendrite/cmd/create-account \
    --config %s --url http://%s \
    --username alice --password a-long-password
`, shellPath(h.path(defaultConfig)), address)
	}
	fmt.Println("Ctrl-C stops the server; the next start goes on with the same data.")
}

// shellPath returns a path relative to the current folder, if the path lies in that folder.
func shellPath(path string) string {
	if wd, err := os.Getwd(); err == nil {
		if rel, err := filepath.Rel(wd, path); err == nil && filepath.IsLocal(rel) {
			return rel
		}
	}
	return path
}

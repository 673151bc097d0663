package config

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/sirupsen/logrus"
)

// maxKeyFile is how large the file of a key or a secret may be, in bytes.
const maxKeyFile = 4 << 10

// firstLine returns the first line of a file with a key or a secret, without the space around it. It warns if every user of the machine can
// read the file.
func firstLine(name string) (string, error) {
	file, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil && info.Mode().Perm()&0o004 != 0 {
		logrus.Warnf("Every user of this machine can read %s, which has a key or a secret: chmod o-r %s", name, name)
	}
	data, err := io.ReadAll(io.LimitReader(file, maxKeyFile+1))
	if err != nil {
		return "", err
	}
	if len(data) > maxKeyFile {
		return "", &fs.PathError{Op: "read", Path: name, Err: fmt.Errorf("larger than %d bytes", maxKeyFile)}
	}
	line, _, _ := bytes.Cut(data, []byte("\n"))
	return string(bytes.TrimSpace(line)), nil
}

package patches

import (
	"encoding/json"
	"os"
	"os/exec"
)

// Download downloads the line's release as a Go module, unless the module cache has it. It returns the folder, which is read-only.
func (l Line) Download() (string, error) {
	out, err := output(exec.Command("go", "mod", "download", "-json", l.Module+"@"+l.Version))
	if err != nil {
		return "", err
	}
	var module struct{ Dir string }
	err = json.Unmarshal(out, &module)
	return module.Dir, err
}

// Copy creates dir and copies the line's release into it.
func (l Line) Copy(dir string) error {
	release, err := l.Download()
	if err != nil {
		return err
	}
	return os.CopyFS(dir, os.DirFS(release)) // the copies are writable, unlike the files in the module cache
}
